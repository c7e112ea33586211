//! Rounds: every path is measured once a round, in an order drawn for the round. Ratios are formed within a round.

use std::time::{Duration, Instant};

use rand::Rng;
use rand::seq::SliceRandom as _;

use super::path::{Entry, Group, Sample};
use super::processor::load_averages;

/// A warm-up is a window of so many milliseconds of every path, not recorded.
const WARM_UP: Duration = Duration::from_millis(100);

/// One round.
#[derive(Clone, Debug)]
pub struct Round {
    /// The load average over one minute at its beginning.
    pub load_average: f64,
    /// Numbers of the paths in the order in which they were measured.
    pub order: Vec<usize>,
    /// By number of the path; `None`: it had failed.
    pub samples: Vec<Option<Sample>>,
}

/// What all rounds yield.
#[derive(Clone, Debug, Default)]
pub struct Rounds {
    /// All of them, none is discarded.
    pub rounds: Vec<Round>,
    /// By number of the path: why it is not measured any more.
    pub failures: Vec<Option<String>>,
}

/// How long and how often.
#[derive(Clone, Copy, Debug)]
pub struct Plan {
    /// Rounds.
    pub rounds: u32,
    /// Of each path in each round.
    pub window: Duration,
    /// No round begins later than this, but the first.
    pub until: Option<Instant>,
}

/// An order of the paths: groups stay together, so that what is compared is measured within a few seconds; which group
/// comes first, and the order within, are drawn.
pub fn draw(groups: &[Group], rng: &mut impl Rng) -> Vec<usize> {
    let mut order: Vec<_> = groups.to_vec();
    order.sort();
    order.dedup();
    order.shuffle(rng);
    let mut numbers = Vec::with_capacity(groups.len());
    for group in order {
        let mut members: Vec<_> = (0..groups.len()).filter(|n| groups[*n] == group).collect();
        members.shuffle(rng);
        numbers.extend(members);
    }
    numbers
}

/// Measures all rounds. A path that fails is not measured again; the others go on.
pub async fn run(entries: &mut [Entry], plan: Plan, rng: &mut impl Rng) -> Rounds {
    let groups: Vec<_> = entries.iter().map(|entry| entry.group).collect();
    let mut result = Rounds { rounds: Vec::new(), failures: vec![None; entries.len()] };
    eprintln!("warming up {} paths ...", entries.len());
    one(entries, &draw(&groups, rng), WARM_UP.min(plan.window), &mut result.failures).await;
    for number in 0..plan.rounds {
        if number > 0 && plan.until.is_some_and(|until| Instant::now() > until) {
            eprintln!("out of time: {number} of {} rounds", plan.rounds);
            break;
        }
        let load_average = load_averages()[0];
        let order = draw(&groups, rng);
        let began = Instant::now();
        let samples = one(entries, &order, plan.window, &mut result.failures).await;
        eprintln!(
            "round {} of {}: {:.1} s, load average {load_average:.1}",
            number + 1,
            plan.rounds,
            began.elapsed().as_secs_f64()
        );
        result.rounds.push(Round { load_average, order, samples });
    }
    result
}

async fn one(
    entries: &mut [Entry],
    order: &[usize],
    window: Duration,
    failures: &mut [Option<String>],
) -> Vec<Option<Sample>> {
    let mut samples = vec![None; entries.len()];
    for &number in order {
        if failures[number].is_some() {
            continue;
        }
        match entries[number].path.measure(window).await {
            Ok(sample) => samples[number] = Some(sample),
            Err(why) => {
                eprintln!("{} fails: {why:#}", entries[number].id);
                failures[number] = Some(format!("{why:#}"));
            }
        }
    }
    samples
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::peers::path::{Kind, Measuring, Path, PathId, Way};
    use rand::SeedableRng as _;
    use rand::rngs::StdRng;

    #[test]
    fn every_path_is_drawn_once_and_groups_stay_together() {
        let groups = [Group::SameHost, Group::Network, Group::SameHost, Group::Network, Group::Network];
        let mut rng = StdRng::seed_from_u64(1);
        let mut first = std::collections::BTreeSet::new();
        for _ in 0..100 {
            let order = draw(&groups, &mut rng);
            let mut sorted = order.clone();
            sorted.sort_unstable();
            assert_eq!(sorted, [0, 1, 2, 3, 4]);
            let changes = order.windows(2).filter(|pair| groups[pair[0]] != groups[pair[1]]).count();
            assert_eq!(changes, 1);
            first.insert(order[0]);
        }
        assert_eq!(first.len(), 5, "any of them may come first");
    }

    struct Fails(u32);

    impl Path for Fails {
        fn measure(&mut self, _: Duration) -> Measuring<'_> {
            Box::pin(async move {
                self.0 = self.0.checked_sub(1).ok_or_else(|| anyhow::anyhow!("worn out"))?;
                Ok(Sample { bytes: 1, ..Sample::default() })
            })
        }
    }

    #[tokio::test]
    async fn a_path_that_fails_is_named_and_the_others_go_on() {
        let entry = |uses| Entry {
            id: PathId::single("p", Way::Get),
            what: String::new(),
            kind: Kind::Peer,
            group: Group::Network,
            path: Box::new(Fails(uses)),
        };
        // One use is the warm-up.
        let mut entries = [entry(10), entry(2)];
        let plan = Plan { rounds: 3, window: Duration::from_millis(1), until: None };
        let result = run(&mut entries, plan, &mut StdRng::seed_from_u64(1)).await;
        assert_eq!(result.rounds.len(), 3);
        assert!(result.rounds.iter().all(|round| round.samples[0].is_some()));
        let second: Vec<_> = result.rounds.iter().map(|round| round.samples[1].is_some()).collect();
        assert_eq!(second, [true, false, false]);
        assert_eq!(result.failures, [None, Some("worn out".to_owned())]);
    }
}
