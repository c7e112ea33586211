//! How much a position counts beside others that are used as often: the time that computing it anew takes, for the room
//! that it takes, and what its client says of it. In powers of two, so that three bits of an entry hold it.

use crate::words::Priority;

/// Different weights.
pub(crate) const WEIGHTS: usize = 8;
/// The exponent of the smallest one.
const LEAST: i32 = -3;
/// What most have: a factor of 1.
const ONE: u8 = -LEAST as u8;
/// Exponents that the cost may come to; beyond them it counts as the last.
const COST: (f64, f64) = (-1.0, 2.0);
/// The cost whose weight is 1, nanoseconds a byte: about that of a model of 8 billion parameters on one GPU (131,072 bytes
/// and 64 us a token). What is not declared costs this.
const USUAL_NS_PER_BYTE: f64 = 0.5;

/// A factor from 1/8 to 16.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub(crate) struct Weight(u8);

impl Weight {
    /// All of them, the smallest first.
    pub(crate) fn all() -> impl DoubleEndedIterator<Item = Weight> {
        (0..WEIGHTS as u8).map(Weight)
    }

    /// Of a position that takes so long to compute, nanoseconds a byte; `None`: nobody said.
    pub(crate) fn new(cost: Option<f64>, priority: Priority) -> Self {
        let cost = cost.map_or(0.0, |ns| (ns / USUAL_NS_PER_BYTE).log2().round().clamp(COST.0, COST.1)) as i32;
        let said = match priority {
            Priority::Low => -2,
            Priority::Normal => 0,
            Priority::High => 2,
        };
        Self((cost + said - LEAST) as u8)
    }

    /// What a value is multiplied with.
    pub(crate) fn factor(self) -> f32 {
        2f32.powi(i32::from(self.0) + LEAST)
    }

    pub(crate) fn index(self) -> usize {
        usize::from(self.0)
    }

    /// Three bits; zero is the weight of most.
    pub(crate) fn bits(self) -> u8 {
        self.0 ^ ONE
    }

    /// Back from [`Weight::bits`].
    pub(crate) fn from_bits(bits: u8) -> Self {
        Self((bits & (WEIGHTS as u8 - 1)) ^ ONE)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn dear_positions_and_those_of_a_high_priority_count_more() {
        let factor = |cost, priority| Weight::new(cost, priority).factor();
        assert_eq!(factor(None, Priority::Normal), 1.0);
        assert_eq!(factor(Some(0.49), Priority::Normal), 1.0);
        assert_eq!(factor(Some(1.1), Priority::Normal), 2.0);
        assert_eq!(factor(Some(1e9), Priority::High), 16.0);
        assert_eq!(factor(Some(1e-9), Priority::Low), 0.125);
        assert_eq!(factor(Some(0.5), Priority::High), 4.0);
        assert_eq!(Weight::new(None, Priority::Normal).bits(), 0);
        assert!(Weight::all().all(|w| Weight::from_bits(w.bits()) == w && w.index() < WEIGHTS));
    }
}
