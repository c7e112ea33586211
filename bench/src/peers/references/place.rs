//! A block that lies in shared memory: a word with the server, then one copy. No store with a copy can be shorter.

use std::io::{Read as _, Write as _};
use std::os::unix::net::UnixStream;
use std::path::PathBuf;
use std::sync::Arc;
use std::time::Duration;

use anyhow::{Context as _, ensure};

use super::server::Reference;
use super::{ANSWER_BYTES, GET, Memory, REQUEST_BYTES, range, request};
use crate::peers::memory::Mapped;
use crate::peers::path::{
    BLOCK_BYTES, BLOCKS, Entry, Group, Kind, Measuring, Path, PathId, Sample, Stretch, WORKING_SET_BYTES, Way,
};

/// Its name.
pub const SHM_PLACE: &str = "shm_place";

struct Place {
    memory: Arc<Memory>,
    reference: Arc<Reference>,
    socket: UnixStream,
    shared: Mapped,
    at: usize,
}

/// Connects and maps.
pub fn entry(memory: &Arc<Memory>, reference: &Arc<Reference>) -> anyhow::Result<Entry> {
    let mut socket = reference.connect_unix()?;
    let mut greeting = [0; REQUEST_BYTES];
    socket.read_exact(&mut greeting).context("greeting of the reference")?;
    let [pid, fd] = greeting.as_chunks::<8>().0 else { unreachable!("16 bytes are twice 8") };
    let path = format!("/proc/{}/fd/{}", u64::from_le_bytes(*pid), u64::from_le_bytes(*fd));
    let shared = Mapped::open(&PathBuf::from(path))?;
    ensure!(shared.bytes().len() == WORKING_SET_BYTES, "the reference shares {} bytes", shared.bytes().len());
    Ok(Entry {
        id: PathId::single(SHM_PLACE, Way::Get),
        what: "request over a Unix socket, the client copies the block out of shared memory".to_owned(),
        kind: Kind::Reference,
        group: Group::SameHost,
        path: Box::new(Place { memory: Arc::clone(memory), reference: Arc::clone(reference), socket, shared, at: 0 }),
    })
}

impl Place {
    fn run(&mut self, window: Duration) -> anyhow::Result<Sample> {
        let mut landing = self.memory.landing()?;
        let mut stretch = Stretch::begin(window, &[self.reference.pid()]);
        while stretch.going() {
            let at = self.at;
            stretch.call(BLOCK_BYTES, || -> anyhow::Result<()> {
                self.socket.write_all(&request(GET, at))?;
                let mut answer = [0; ANSWER_BYTES];
                self.socket.read_exact(&mut answer)?;
                let offset = u64::from_le_bytes(answer) as usize;
                let from = self.shared.bytes().get(offset..).and_then(|rest| rest.get(..BLOCK_BYTES));
                landing[range(at)].copy_from_slice(from.context("a place outside of the shared memory")?);
                Ok(())
            })?;
            self.at = (at + 1) % BLOCKS;
        }
        let last = range((self.at + BLOCKS - 1) % BLOCKS);
        ensure!(landing[last.clone()] == self.memory.source[last], "wrong bytes landed");
        Ok(stretch.end())
    }
}

impl Path for Place {
    fn measure(&mut self, window: Duration) -> Measuring<'_> {
        Box::pin(async move { tokio::task::block_in_place(|| self.run(window)) })
    }
}
