//! Hints as clients could give them, made from a trace's future, with seeded noise that the policy is not told of.

use std::str::FromStr;

use kvkeep_core::Hint;

use super::replay::Prepared;

/// Which hints are given with the requests.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub struct Hints {
    /// The last request of a session says so.
    pub end: bool,
    /// Every other one says when the next comes, off by a factor of at most so much either way (log-uniform).
    pub due: Option<f64>,
    /// For half of the sessions only.
    pub half: bool,
    /// Share of the requests that are not their session's last and say that they are.
    pub false_ends: f64,
    /// No request names its session.
    pub unnamed: bool,
}

impl FromStr for Hints {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        let mut hints = Self::default();
        for word in text.split(',') {
            match word.split_once(':') {
                None if word == "none" => {}
                None if word == "end" => hints.end = true,
                None if word == "half" => hints.half = true,
                None if word == "unnamed" => hints.unnamed = true,
                Some(("due", factor)) => {
                    let factor: f64 = factor.parse().map_err(|_| format!("{word:?}: the factor is a number"))?;
                    if !(1.0..=1000.0).contains(&factor) {
                        return Err(format!("{word:?}: a factor is 1 to 1000"));
                    }
                    hints.due = Some(factor);
                }
                Some(("false-ends", share)) => {
                    let percent = share.strip_suffix('%').and_then(|p| p.parse::<f64>().ok());
                    let percent = percent.filter(|p| (0.0..=100.0).contains(p));
                    hints.false_ends = percent.ok_or_else(|| format!("{word:?}: the share is 0% to 100%"))? / 100.0;
                }
                _ => {
                    return Err(format!(
                        "{word:?} is no hint; there are none, end, due:FACTOR, half, false-ends:N%, unnamed"
                    ));
                }
            }
        }
        Ok(hints)
    }
}

/// splitmix64: enough to draw noise, the same for every machine.
struct Draws(u64);

impl Draws {
    fn next(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9E37_79B9_7F4A_7C15);
        let mut x = self.0;
        x = (x ^ (x >> 30)).wrapping_mul(0xBF58_476D_1CE4_E5B9);
        x = (x ^ (x >> 27)).wrapping_mul(0x94D0_49BB_1331_11EB);
        x ^ (x >> 31)
    }

    /// From 0 to below 1.
    fn unit(&mut self) -> f64 {
        (self.next() >> 11) as f64 / (1u64 << 53) as f64
    }
}

/// Lets the requests of a trace say what `hints` asks for.
pub fn give(trace: &mut Prepared, hints: Hints, seed: u64) {
    let mut next = vec![None; trace.turns.iter().map(|t| t.session as usize + 1).max().unwrap_or(0)];
    let mut draws = Draws(seed);
    let chosen: Vec<bool> = next.iter().map(|_| !hints.half || draws.next() & 1 == 1).collect();
    for turn in trace.turns.iter_mut().rev() {
        let session = turn.session as usize;
        let (noise, slip) = (draws.unit(), draws.unit());
        let coming = next[session].replace(turn.at_ms);
        turn.info.session = if hints.unnamed { 0 } else { u64::from(turn.session) + 1 };
        turn.info.hint = match coming {
            _ if !chosen[session] => None,
            None => hints.end.then_some(Hint::Ends),
            Some(_) if slip < hints.false_ends => Some(Hint::Ends),
            Some(at_ms) => hints.due.map(|factor| {
                let gap = (at_ms - turn.at_ms) as f64;
                Hint::DueIn((gap * factor.powf(2.0 * noise - 1.0)).min(f64::from(u32::MAX)) as u32)
            }),
        };
    }
}
