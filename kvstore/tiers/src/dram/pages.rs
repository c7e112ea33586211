//! What pages the kernel really gave: read from `/proc/self/smaps`, for advice that was accepted says nothing.

use std::collections::HashSet;
use std::fs::File;
use std::io::{BufRead, BufReader};
use std::path::Path;

use kvkeep_core::Result;

use super::HUGE_PAGE_BYTES;
use super::grow::{FixedRegion, io_error};
use super::memory::UNIT_BYTES;

const SMAPS: &str = "/proc/self/smaps";

/// The smallest page size of the regions' mappings; 4 KiB where there are none.
pub(super) fn page_bytes(regions: &[FixedRegion]) -> Result<u64> {
    let starts: HashSet<u64> = regions.iter().map(|r| r.as_ptr() as u64).collect();
    let path = Path::new(SMAPS);
    let read = || File::open(path).and_then(|file| smallest_page(BufReader::new(file), &starts));
    read().map(|found| found.unwrap_or(UNIT_BYTES as u64)).map_err(|e| io_error("cannot read the page sizes", path, &e))
}

/// One mapping's lines, so far.
#[derive(Default)]
struct Figures {
    rss: u64,
    huge: u64,
    kernel_page: u64,
}

impl Figures {
    fn page(&self) -> u64 {
        // Huge where nearly all that is resident is mapped in huge pages; a few small ones at an end do not count.
        if self.huge > 0 && self.huge * 10 >= self.rss * 9 { HUGE_PAGE_BYTES } else { self.kernel_page }
    }
}

fn smallest_page(smaps: impl BufRead, starts: &HashSet<u64>) -> std::io::Result<Option<u64>> {
    let mut pages = Vec::new();
    let mut current: Option<Figures> = None;
    for line in smaps.lines() {
        let line = line?;
        let Some((name, value)) = line.split_once([':', '-']) else { continue };
        if let Ok(start) = u64::from_str_radix(name, 16)
            && line.as_bytes().get(name.len()) == Some(&b'-')
        {
            pages.extend(current.take().map(|f| f.page()));
            current = starts.contains(&start).then(Figures::default);
        } else if let Some(figures) = &mut current {
            let bytes = value.split_whitespace().next().and_then(|n| n.parse::<u64>().ok()).unwrap_or(0) * 1024;
            match name {
                "Rss" => figures.rss = bytes,
                "ShmemPmdMapped" | "FilePmdMapped" => figures.huge += bytes,
                "KernelPageSize" => figures.kernel_page = bytes,
                _ => {}
            }
        }
    }
    pages.extend(current.map(|f| f.page()));
    Ok(pages.into_iter().min())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_smallest_page_of_the_named_mappings_counts() {
        let smaps = "7f0000000000-7f0004000000 rw-s 00000000 00:01 9 /x\nRss: 65536 kB\nShmemPmdMapped: 65536 kB\n\
                     KernelPageSize: 4 kB\n7f1000000000-7f1004000000 rw-s 00000000 00:01 9 /y\nKernelPageSize: 4 kB\n\
                     Rss: 65536 kB\nShmemPmdMapped: 2048 kB\n";
        let page = |starts: &[u64]| smallest_page(smaps.as_bytes(), &starts.iter().copied().collect()).unwrap();
        assert_eq!(page(&[0x7f00_0000_0000]), Some(HUGE_PAGE_BYTES));
        assert_eq!(page(&[0x7f00_0000_0000, 0x7f10_0000_0000]), Some(4096));
        assert_eq!(page(&[]), None);
    }
}
