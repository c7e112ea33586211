//! What is learned: how likely a position of each class is used again at each age, and from that how much it is worth to
//! keep it.
//!
//! *Hazards* by Kaplan and Meier's estimator with right censoring: of the positions that reached an age, how many were
//! used in the bucket that begins there. A class with few observations leans on the coarser one that it belongs to: few
//! requests, that is, for the positions of one prompt stand or fall together and are one experience, however many. The
//! *index* is Gittins': the best hits per second of occupied room that can be had by keeping a position from its age on
//! until some later one. What is observed fades with a half-life of a day.

use super::ages::{Ages, BUCKETS};
use super::calendar::Calendar;
use super::classes::{CLASSES, COARSE, ClassId, HISTORY, NOISES, Sort, TRUSTS};
use crate::ids::Instant;

/// Requests that a class's coarser one counts as.
const CLASS_PRIOR: f64 = 16.0;
/// Requests that the whole counts as, for a coarse class.
const COARSE_PRIOR: f64 = 4.0;
/// Requests that the belief of the first minutes counts as.
const FIRST_PRIOR: f64 = 1.0;
/// The belief of the first minutes: a constant chance per bucket (of the first, which is wider than the next, six times
/// as much), so that the older goes first.
const FIRST_HAZARD: f64 = 0.02;
/// What is believed of a session that is said to have ended, as a share of the chance of any: it goes before all others
/// until one was seen to come back.
const ENDED_BELIEF: f64 = 1e-3;
/// Half-life of observations, milliseconds.
const HALF_LIFE_MS: f64 = 24.0 * 3600.0 * 1000.0;
/// Per noise, how many buckets around the estimate the next use is believed to come in, at first.
const BELIEVED_SPREAD: [usize; NOISES] = [4, 8, 14];

/// Hits per second by class and age.
pub(crate) type Index = Box<[[f32; BUCKETS]; CLASSES]>;
/// Something per bucket of ages.
pub(crate) type PerBucket = [f64; BUCKETS];
const NOTHING: PerBucket = [0.0; BUCKETS];

/// Observations and what follows from them. See the module.
pub(crate) struct Hazards {
    /// Uses by class and gap.
    pub(crate) used: Box<[PerBucket; CLASSES]>,
    /// Positions that nobody watches any more, by class and the age at which they were lost sight of.
    pub(crate) lost: Box<[PerBucket; CLASSES]>,
    pub(crate) requests: Requests,
    /// Hits per second by class and age, as of the last fit.
    index: Index,
    faded: Option<Instant>,
}

/// How many requests there were, by the first positions of their prompts, and how many accesses.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub(crate) struct Requests {
    pub(crate) accesses: f64,
    pub(crate) requests: f64,
}

impl Requests {
    /// Positions that a request has, on average; 1 before there was any.
    fn positions(self) -> f64 {
        if self.requests > 0.0 { (self.accesses / self.requests).max(1.0) } else { 1.0 }
    }
}

/// Observations of one class, or of several together.
#[derive(Clone)]
struct Observed {
    used: PerBucket,
    /// Reached the bucket and were watched through it; those lost in it count half.
    at_risk: PerBucket,
}

impl Observed {
    fn new(used: &PerBucket, open: &PerBucket) -> Self {
        let mut at_risk = NOTHING;
        let mut later = 0.0;
        for k in (0..BUCKETS).rev() {
            at_risk[k] = later + used[k] + open[k] / 2.0;
            later += used[k] + open[k];
        }
        Self { used: *used, at_risk }
    }

    fn none() -> Self {
        Self { used: NOTHING, at_risk: NOTHING }
    }

    fn add(&mut self, other: &Observed) {
        for k in 0..BUCKETS {
            self.used[k] += other.used[k];
            self.at_risk[k] += other.at_risk[k];
        }
    }

    /// The hazards, leaning on `belief` as on so many observations.
    fn hazards(&self, prior: f64, belief: impl Fn(usize) -> f64) -> PerBucket {
        std::array::from_fn(|k| ((self.used[k] + prior * belief(k)) / (self.at_risk[k] + prior)).clamp(0.0, 1.0))
    }
}

/// What clients' estimates came to, by the distance of use and estimate in buckets.
struct Ratios {
    used: [f64; 2 * BUCKETS],
    at_risk: [f64; 2 * BUCKETS],
}

/// Where a distance of so many buckets is kept.
fn distance(age: usize, due: usize) -> usize {
    age + BUCKETS - due
}

impl Hazards {
    pub(crate) fn new(ages: &Ages) -> Self {
        let mut hazards = Self {
            used: Box::new([NOTHING; CLASSES]),
            lost: Box::new([NOTHING; CLASSES]),
            requests: Requests::default(),
            index: Box::new([[0.0; BUCKETS]; CLASSES]),
            faded: None,
        };
        hazards.index = hazards.seen(&Calendar::new(), Instant(0)).learn(ages);
        hazards
    }

    /// A position was accessed, the `first` of its prompt or another.
    pub(crate) fn accessed(&mut self, first: bool) {
        self.requests.accesses += 1.0;
        self.requests.requests += f64::from(u8::from(first));
    }

    /// A position of `class` was used after a gap in bucket `gap`; it stands for `weight` positions.
    pub(crate) fn used(&mut self, class: ClassId, gap: usize, weight: u32) {
        self.used[class.index()][gap] += f64::from(weight);
    }

    /// A position of `class` was lost sight of at an age in bucket `age`.
    pub(crate) fn lost(&mut self, class: ClassId, age: usize, weight: u32) {
        self.lost[class.index()][age] += f64::from(weight);
    }

    /// Hits per second of room by class and age.
    pub(crate) fn index(&self) -> &Index {
        &self.index
    }

    /// Takes over what was learned.
    pub(crate) fn set_index(&mut self, index: Index) {
        self.index = index;
    }

    /// What was observed until now, those still open included, for [`Seen::learn`].
    pub(crate) fn seen(&mut self, calendar: &Calendar, now: Instant) -> Seen {
        self.fade(now);
        let positions = self.requests.positions();
        Seen { used: self.used.clone(), lost: self.lost.clone(), positions, calendar: calendar.clone(), now }
    }

    fn fade(&mut self, now: Instant) {
        if let Some(before) = self.faded.filter(|before| *before < now) {
            let factor = fading(now, before);
            let Requests { accesses, requests } = &mut self.requests;
            for seen in self.used.iter_mut().chain(self.lost.iter_mut()).flatten().chain([accesses, requests]) {
                *seen *= factor;
            }
        }
        self.faded = Some(now);
    }

    /// What is known of each class now, those still open included, in the form of `lost`: for a snapshot.
    pub(crate) fn open_and_lost(&self, ages: &Ages, calendar: &Calendar, now: Instant) -> Box<[PerBucket; CLASSES]> {
        let mut lost = self.lost.clone();
        for (class, lost) in lost.iter_mut().enumerate() {
            calendar.visit(ClassId(class as u8), |at, count| {
                lost[ages.since(now, at)] += f64::from(count) * fading(now, at);
            });
        }
        lost
    }
}

/// A copy of what was observed, to be learned from apart from where observations are made.
pub(crate) struct Seen {
    used: Box<[PerBucket; CLASSES]>,
    lost: Box<[PerBucket; CLASSES]>,
    /// Of a request, on average: observations that one experience makes.
    positions: f64,
    calendar: Calendar,
    now: Instant,
}

impl Seen {
    /// The index that follows from it.
    pub(crate) fn learn(&self, ages: &Ages) -> Index {
        let [class_prior, coarse_prior, first_prior] =
            [CLASS_PRIOR, COARSE_PRIOR, FIRST_PRIOR].map(|requests| requests * self.positions);
        let observed: Vec<Observed> = (0..CLASSES).map(|c| self.observed(ages, ClassId(c as u8))).collect();
        let mut whole = Observed::none();
        let mut coarse: [Observed; COARSE] = std::array::from_fn(|_| Observed::none());
        let mut ended: [Observed; TRUSTS] = std::array::from_fn(|_| Observed::none());
        let mut ratios: [Ratios; NOISES] =
            std::array::from_fn(|_| Ratios { used: [0.0; 2 * BUCKETS], at_risk: [0.0; 2 * BUCKETS] });
        for (class, seen) in observed.iter().enumerate() {
            match ClassId(class as u8).sort() {
                Sort::History { coarse: c } => {
                    whole.add(seen);
                    coarse[c].add(seen);
                }
                Sort::Ended { trust } => ended[trust].add(seen),
                Sort::Due { noise, due } => {
                    for k in 0..BUCKETS {
                        ratios[noise].used[distance(k, due)] += seen.used[k];
                        ratios[noise].at_risk[distance(k, due)] += seen.at_risk[k];
                    }
                }
            }
        }
        let whole = whole.hazards(first_prior, |k| if k == 0 { 6.0 * FIRST_HAZARD } else { FIRST_HAZARD });
        let coarse = coarse.map(|seen| seen.hazards(coarse_prior, |k| whole[k]));
        let ended = ended.map(|seen| seen.hazards(coarse_prior, |k| whole[k] * ENDED_BELIEF));
        let mut index: Index = Box::new([[0.0; BUCKETS]; CLASSES]);
        for (class, seen) in observed.iter().enumerate() {
            let hazards = match ClassId(class as u8).sort() {
                Sort::History { coarse: c } => seen.hazards(class_prior, |k| coarse[c][k]),
                Sort::Ended { trust } => seen.hazards(class_prior, |k| ended[trust][k]),
                Sort::Due { noise, due } => {
                    let ratios = &ratios[noise];
                    seen.hazards(class_prior, |k| {
                        let at = distance(k, due);
                        let belief = believed(BELIEVED_SPREAD[noise], k, due, whole[k]);
                        (ratios.used[at] + coarse_prior * belief) / (ratios.at_risk[at] + coarse_prior)
                    })
                }
            };
            gittins(ages, &hazards, &mut index[class]);
        }
        index
    }

    fn observed(&self, ages: &Ages, class: ClassId) -> Observed {
        let mut open = self.lost[class.index()];
        let now = self.now;
        self.calendar.visit(class, |at, count| open[ages.since(now, at)] += f64::from(count) * fading(now, at));
        Observed::new(&self.used[class.index()], &open)
    }
}

/// What is left at `now` of the weight of something observed at `at`.
fn fading(now: Instant, at: Instant) -> f64 {
    (-(now.0.saturating_sub(at.0) as f64) / HALF_LIFE_MS).exp2()
}

/// The chance in bucket `k` of a use that was announced for bucket `due`, before anything was learned: even odds for each
/// bucket within the spread; afterwards as of `any` position.
fn believed(spread: usize, k: usize, due: usize, any: f64) -> f64 {
    if k + spread < due {
        0.0
    } else if k <= due + spread {
        1.0 / (due + spread + 1 - k) as f64
    } else {
        any
    }
}

/// Fills in the Gittins index of each age: from the last bucket on, a bucket and the stretch after it are taken together
/// as long as that stretch is worth more by itself.
fn gittins(ages: &Ages, hazards: &PerBucket, index: &mut [f32; BUCKETS]) {
    #[derive(Clone, Copy)]
    struct Stretch {
        hits: f64,
        seconds: f64,
        survive: f64,
    }
    let mut later: Vec<Stretch> = Vec::with_capacity(BUCKETS);
    for k in (0..BUCKETS).rev() {
        let hazard = hazards[k];
        let mut mine = Stretch {
            hits: hazard,
            seconds: ages.width_ms(k) as f64 / 1000.0 * (1.0 - hazard / 2.0),
            survive: 1.0 - hazard,
        };
        while let Some(next) = later.last().filter(|next| next.hits * mine.seconds > mine.hits * next.seconds) {
            mine.hits += mine.survive * next.hits;
            mine.seconds += mine.survive * next.seconds;
            mine.survive *= next.survive;
            later.pop();
        }
        later.push(mine);
        index[k] = (mine.hits / mine.seconds) as f32;
    }
}

const _: () = assert!(HISTORY < CLASSES);

#[cfg(test)]
mod tests {
    use super::*;
    use crate::words::RequestInfo;

    /// A dozen requests whose prompts have so many positions: what is believed of each age of their class.
    fn learned(positions: u32) -> (Vec<f32>, Vec<f32>) {
        let ages = Ages::new();
        let class = ClassId::of_history(&super::super::classes::Seen {
            uses: 1,
            gap: None,
            tail: false,
            info: &RequestInfo::default(),
        });
        let mut hazards = Hazards::new(&ages);
        let before = hazards.index()[class.index()].to_vec();
        for request in 0..12 {
            (0..positions).for_each(|position| hazards.accessed(position == 0));
            hazards.used(class, 10 + request % 3, positions);
            hazards.lost(class, 20 + request, positions);
        }
        let index = hazards.seen(&Calendar::new(), Instant(0)).learn(&ages);
        (before, index[class.index()].to_vec())
    }

    #[test]
    fn a_prompt_is_one_experience_however_many_positions_it_has() {
        let (before, of_one) = learned(1);
        let (_, of_many) = learned(200);
        assert_ne!(before, of_one, "nothing was learned");
        for (k, (one, many)) in of_one.iter().zip(&of_many).enumerate() {
            assert!((one - many).abs() <= one.abs() * 1e-5, "bucket {k}: {one} of prompts of one, {many} of 200");
        }
    }
}
