//! What positions of one handle share: the handle itself, the shape of its format, and what it uses.

use std::collections::HashMap;
use std::num::NonZeroU32;

use crate::format::{Format, Rule};
use crate::ids::Handle;

use super::entry::{Level, Part};

/// Index of a home. Four bytes in every entry instead of eight, and the format's rules at hand.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct HomeId(u32);

/// What one group asks of a chain, counted in positions and blocks.
#[derive(Clone, Copy, Debug)]
pub(crate) struct GroupShape {
    /// Positions per block.
    pub span: u32,
    pub shards: u32,
    pub need: Need,
}

/// Which blocks of a group a boundary needs.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Need {
    All,
    /// The last so many blocks, at least 1.
    Last(u32),
    /// The one that ends at the boundary.
    State,
}

impl GroupShape {
    /// Whether a block of the group ends with position `index`.
    pub(crate) fn ends_at(&self, index: u32) -> bool {
        (index + 1).is_multiple_of(self.span)
    }
}

/// The rules of a format.
#[derive(Clone, Debug)]
pub(crate) struct Shape {
    pub groups: Vec<GroupShape>,
    /// A boundary is a multiple of so many positions: the least common multiple of the groups' spans.
    pub unit: u64,
    /// Every group is `all`: nothing goes early.
    pub plain: bool,
    /// Positions of the longest window; 0: no window group.
    pub window_positions: u32,
    tokens_per_key: u32,
    /// Declared time to compute what stands at the start of a chain, nanoseconds a byte.
    cost_ns_per_byte: Option<f64>,
    /// Tokens of context that double it.
    cost_doubles_at: Option<NonZeroU32>,
}

impl Shape {
    pub(crate) fn of(format: &Format) -> Self {
        let groups: Vec<GroupShape> = format
            .groups
            .iter()
            .map(|g| GroupShape {
                span: format.positions_per_block(g),
                shards: u32::from(g.shards),
                need: match g.rule {
                    Rule::All => Need::All,
                    Rule::Window { tokens } => Need::Last(tokens.div_ceil(g.tokens_per_block.max(1)).max(1)),
                    Rule::State => Need::State,
                },
            })
            .collect();
        // Saturates far beyond any chain: such a format then has no boundary, as its spans demand.
        let unit = groups.iter().fold(1, |unit, g| lcm(unit, u64::from(g.span)));
        let window_positions = groups
            .iter()
            .map(|g| match g.need {
                Need::Last(blocks) => blocks.saturating_mul(g.span),
                Need::All | Need::State => 0,
            })
            .max()
            .unwrap_or(0);
        let plain = groups.iter().all(|g| g.need == Need::All);
        let declared = f64::from(format.prefill_us_per_token) * 1000.0;
        Self {
            groups,
            unit,
            plain,
            window_positions,
            tokens_per_key: format.tokens_per_key,
            cost_ns_per_byte: (declared > 0.0).then(|| declared / format.bytes_per_token()),
            cost_doubles_at: NonZeroU32::new(format.prefill_doubles_at_tokens),
        }
    }

    /// Declared time to compute position `index`, nanoseconds for each of its bytes; `None`: not declared.
    pub(crate) fn cost(&self, index: u32) -> Option<f64> {
        let context = f64::from(index) * f64::from(self.tokens_per_key);
        let growth = self.cost_doubles_at.map_or(0.0, |doubles| context / f64::from(doubles.get()));
        Some(self.cost_ns_per_byte? * (1.0 + growth))
    }

    /// Whether an input of so many tokens (0: not said) ends in position `index` without filling it.
    pub(crate) fn ends_within(&self, input_tokens: u32, index: u32) -> bool {
        let tokens = self.tokens_per_key;
        tokens > 1 && index == input_tokens / tokens && !input_tokens.is_multiple_of(tokens)
    }

    /// Parts that a whole position `index` has.
    pub(crate) fn parts_at(&self, index: u32) -> usize {
        self.groups.iter().filter(|g| g.ends_at(index)).map(|g| g.shards as usize).sum()
    }

    /// Whether all shards of every group that `asked` names and that has a block ending at `index` are among `parts`.
    pub(crate) fn whole(&self, index: u32, parts: &[Part], asked: impl Fn(Need) -> bool) -> bool {
        self.groups.iter().enumerate().filter(|(_, g)| asked(g.need) && g.ends_at(index)).all(|(i, g)| {
            let here = parts.iter().filter(|p| usize::from(p.group().0) == i).count();
            here == g.shards as usize
        })
    }
}

fn lcm(a: u64, b: u64) -> u64 {
    let gcd = |mut a: u64, mut b: u64| {
        while b != 0 {
            (a, b) = (b, a % b);
        }
        a
    };
    (a / gcd(a, b)).saturating_mul(b)
}

/// What the positions of one handle hold.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Usage {
    /// Positions with at least one part.
    pub positions: u64,
    /// Parts with at least one copy.
    pub parts: u64,
    /// Raw bytes of copies in DRAM.
    pub dram_bytes: u64,
    /// Raw bytes of copies on NVMe.
    pub nvme_bytes: u64,
}

impl Usage {
    pub(crate) fn bytes_mut(&mut self, level: Level) -> &mut u64 {
        match level {
            Level::Dram => &mut self.dram_bytes,
            Level::Nvme => &mut self.nvme_bytes,
        }
    }
}

/// One handle in use.
#[derive(Debug)]
pub(crate) struct Home {
    pub handle: Handle,
    pub shape: Shape,
    pub usage: Usage,
    entries: u32,
}

/// Handles in use; one leaves with its last entry.
#[derive(Debug, Default)]
pub(crate) struct Homes {
    homes: Vec<Home>,
    vacant: Vec<u32>,
    by_handle: HashMap<Handle, u32>,
}

impl Homes {
    pub(crate) fn get(&self, id: HomeId) -> &Home {
        &self.homes[id.0 as usize]
    }

    pub(crate) fn get_mut(&mut self, id: HomeId) -> &mut Home {
        &mut self.homes[id.0 as usize]
    }

    pub(crate) fn find(&self, handle: Handle) -> Option<&Home> {
        self.by_handle.get(&handle).map(|i| &self.homes[*i as usize])
    }

    pub(crate) fn iter(&self) -> impl Iterator<Item = &Home> {
        self.by_handle.values().map(|i| &self.homes[*i as usize])
    }

    /// The handle's home, made if it has none. Follow with [`Homes::enter`] for each entry.
    pub(crate) fn intern(&mut self, handle: Handle, format: &Format) -> HomeId {
        if let Some(i) = self.by_handle.get(&handle) {
            return HomeId(*i);
        }
        let home = Home { handle, shape: Shape::of(format), usage: Usage::default(), entries: 0 };
        let i = match self.vacant.pop() {
            Some(i) => {
                self.homes[i as usize] = home;
                i
            }
            None => {
                self.homes.push(home);
                self.homes.len() as u32 - 1
            }
        };
        self.by_handle.insert(handle, i);
        HomeId(i)
    }

    /// An entry of this home was made.
    pub(crate) fn enter(&mut self, id: HomeId) {
        self.homes[id.0 as usize].entries += 1;
    }

    /// An entry of this home has gone.
    pub(crate) fn leave(&mut self, id: HomeId) {
        let home = &mut self.homes[id.0 as usize];
        home.entries -= 1;
        if home.entries == 0 {
            self.by_handle.remove(&home.handle);
            self.vacant.push(id.0);
        }
    }
}
