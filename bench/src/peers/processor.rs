//! CPU time of a measurement, and what machine it is made on.

use rustix::time::{ClockId, clock_gettime};
use serde::Serialize;

use crate::measure::cpu_seconds;

/// The CPU clock of this process and of some others. Its own part is exact; the others' comes in ticks of the kernel, 10 ms.
#[derive(Clone, Debug)]
pub struct Processor {
    servers: Vec<u32>,
}

impl Processor {
    /// Of this process and of these.
    pub fn of(servers: &[u32]) -> Self {
        Self { servers: servers.to_vec() }
    }

    /// Seconds used so far, user and system, all threads.
    pub fn seconds(&self) -> f64 {
        let own = clock_gettime(ClockId::ProcessCPUTime);
        let own = own.tv_sec as f64 + own.tv_nsec as f64 / 1e9;
        own + self.servers.iter().filter_map(|pid| cpu_seconds(*pid)).sum::<f64>()
    }
}

/// What a figure was measured on.
#[derive(Clone, Debug, Serialize)]
pub struct Machine {
    /// As the CPU calls itself.
    pub cpu: String,
    /// Processors that the system shows.
    pub cpus: usize,
    /// The largest cache, as the system writes it.
    pub last_level_cache: String,
    /// Bytes of memory.
    pub memory_bytes: u64,
    /// Release of the kernel.
    pub kernel: String,
    /// Its setting for huge pages of private and of shared memory.
    pub huge_pages: [String; 2],
}

impl Machine {
    /// This one. What the system does not tell is empty or 0.
    pub fn this() -> Self {
        let read = |path: &str| std::fs::read_to_string(path).unwrap_or_default().trim().to_owned();
        let after = |text: &str, label: &str| {
            let line = text.lines().find(|line| line.starts_with(label)).unwrap_or_default();
            line.split_once(':').map(|(_, value)| value.trim().to_owned()).unwrap_or_default()
        };
        let memory = after(&read("/proc/meminfo"), "MemTotal");
        let chosen = |path: &str| {
            let all = read(path);
            all.split(['[', ']']).nth(1).map(str::to_owned).unwrap_or_default()
        };
        Self {
            cpu: after(&read("/proc/cpuinfo"), "model name"),
            cpus: std::thread::available_parallelism().map_or(0, Into::into),
            last_level_cache: read("/sys/devices/system/cpu/cpu0/cache/index3/size"),
            memory_bytes: memory.split(' ').next().and_then(|kib| kib.parse::<u64>().ok()).unwrap_or_default() * 1024,
            kernel: read("/proc/sys/kernel/osrelease"),
            huge_pages: ["enabled", "shmem_enabled"]
                .map(|name| chosen(&format!("/sys/kernel/mm/transparent_hugepage/{name}"))),
        }
    }
}

/// The load averages over 1, 5 and 15 minutes.
pub fn load_averages() -> [f64; 3] {
    let text = std::fs::read_to_string("/proc/loadavg").unwrap_or_default();
    let mut numbers = text.split(' ').filter_map(|word| word.parse().ok());
    std::array::from_fn(|_| numbers.next().unwrap_or_default())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn work_costs_cpu_time() {
        let clock = Processor::of(&[]);
        let before = clock.seconds();
        let mut n = 0u64;
        while clock.seconds() - before < 0.001 {
            n = std::hint::black_box(n + 1);
        }
        assert!(n > 0);
    }

    #[test]
    fn a_machine_has_processors_and_memory() {
        let machine = Machine::this();
        assert!(machine.cpus > 0 && machine.memory_bytes > 0);
    }
}
