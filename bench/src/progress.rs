//! How far a replay is: a bar where somebody looks, plain lines where nobody does.

use std::io::IsTerminal as _;
use std::sync::Arc;
use std::time::{Duration, Instant};

use indicatif::{ProgressBar, ProgressDrawTarget, ProgressStyle};
use tokio::sync::oneshot;
use tokio::task::JoinHandle;

use crate::measure::share;
use crate::replay::engine::Shared;
use crate::replay::tally::Live;

/// Between two looks on a terminal.
const BAR_PERIOD: Duration = Duration::from_millis(200);
/// Between two lines elsewhere.
const LINE_PERIOD: Duration = Duration::from_secs(5);

/// A running display.
pub struct Watch {
    end: oneshot::Sender<()>,
    task: JoinHandle<()>,
}

/// Starts showing; `total` requests where that is known.
pub fn watch(shared: Arc<Shared>, total: Option<u64>) -> Watch {
    let (end, ended) = oneshot::channel();
    Watch { end, task: tokio::spawn(show(shared, total, ended)) }
}

impl Watch {
    /// Shows the last state and stops.
    pub async fn end(self) {
        // The display may have gone first; then there is nothing to stop.
        let _ = self.end.send(());
        let _ = self.task.await;
    }
}

async fn show(shared: Arc<Shared>, total: Option<u64>, mut ended: oneshot::Receiver<()>) {
    let terminal = std::io::stderr().is_terminal();
    let bar = terminal.then(|| bar(total));
    let period = if terminal { BAR_PERIOD } else { LINE_PERIOD };
    let (mut before, mut bytes_before) = (Instant::now(), 0);
    loop {
        let over = tokio::time::timeout(period, &mut ended).await.is_ok();
        let live = &shared.live;
        let bytes = Live::get(&live.bytes);
        let rate = (bytes - bytes_before) as f64 / 1e9 / before.elapsed().as_secs_f64().max(1e-3);
        (before, bytes_before) = (Instant::now(), bytes);
        let requests = Live::get(&live.requests);
        let text = format!(
            "hit {:.1} %  {rate:.2} GB/s  wrong {}  durable {}  sessions {}",
            share(Live::get(&live.hit_tokens), Live::get(&live.input_tokens)) * 100.0,
            Live::get(&live.bytes_wrong),
            shared.ledger.len(),
            shared.sessions.len(),
        );
        match &bar {
            Some(bar) => {
                bar.set_position(requests);
                bar.set_message(text);
            }
            None => {
                eprintln!("replay: {requests}{} requests  {text}", total.map(|t| format!("/{t}")).unwrap_or_default())
            }
        }
        if over {
            if let Some(bar) = bar {
                bar.finish_and_clear();
            }
            return;
        }
    }
}

/// How far a number of steps of one kind are: a bar on a terminal, a line now and then elsewhere.
pub struct Steps {
    what: &'static str,
    total: u64,
    shown: Option<Shown>,
}

enum Shown {
    Bar(ProgressBar),
    Lines(Instant),
}

impl Steps {
    /// Begins; nothing is shown without `show`.
    pub fn new(what: &'static str, total: u64, show: bool) -> Self {
        let shown = match show {
            false => None,
            true if std::io::stderr().is_terminal() => {
                let bar = ProgressBar::with_draw_target(Some(total), ProgressDrawTarget::stderr());
                let style = ProgressStyle::with_template("{bar:30} {pos}/{len} {msg}");
                Some(Shown::Bar(bar.with_style(style.expect("the template above is well-formed"))))
            }
            true => Some(Shown::Lines(Instant::now())),
        };
        Self { what, total, shown }
    }

    /// So many are done.
    pub fn at(&mut self, done: u64, more: &str) {
        match &mut self.shown {
            Some(Shown::Bar(bar)) => {
                bar.set_position(done);
                bar.set_message(format!("{}  {more}", self.what));
            }
            Some(Shown::Lines(last)) if last.elapsed() >= LINE_PERIOD => {
                *last = Instant::now();
                eprintln!("{}: {done}/{}  {more}", self.what, self.total);
            }
            _ => {}
        }
    }

    /// The bar goes.
    pub fn end(self) {
        if let Some(Shown::Bar(bar)) = self.shown {
            bar.finish_and_clear();
        }
    }
}

fn bar(total: Option<u64>) -> ProgressBar {
    let target = ProgressDrawTarget::stderr();
    let (bar, template) = match total {
        Some(total) => {
            (ProgressBar::with_draw_target(Some(total), target), "{bar:30} {pos}/{len} requests  {elapsed}  {msg}")
        }
        None => (ProgressBar::with_draw_target(None, target), "{spinner} {pos} requests  {elapsed}  {msg}"),
    };
    bar.with_style(ProgressStyle::with_template(template).expect("the templates above are well-formed"))
}
