//! The references' server: this program in another process. It ends with whoever started it.

use std::io::{self, Read as _, Write as _};
use std::net::{TcpListener, TcpStream};
use std::os::fd::AsRawFd as _;
use std::os::linux::net::SocketAddrExt as _;
use std::os::unix::net::{SocketAddr, UnixListener, UnixStream};
use std::sync::Arc;
use std::time::Duration;

use anyhow::Context as _;
use clap::Args;
use kvkeep_core::ChunkSums;
use parking_lot::Mutex;

use super::tcp::receive_summed;
use super::{ANSWER_BYTES, GET, HEADER_BYTES, PUT, REQUEST_BYTES, parse, range, working_set};
use crate::node::{Node, Recipe};
use crate::peers::memory::{Pages, sealed_file};
use crate::peers::path::{BLOCK_BYTES, BLOCKS};

/// How often the server looks whether its parent still lives.
const PARENT_LOOK: Duration = Duration::from_millis(200);
/// Connections served at once, over both sockets.
const CONNECTIONS_MAX: usize = 64;

/// Flags of the hidden `kvkeep-bench peers-reference`.
#[derive(Args, Debug)]
pub struct ReferenceCommand {
    /// Where blocks go over TCP
    #[arg(long, default_value = "127.0.0.1:0")]
    listen: String,
    /// Abstract name of the Unix socket
    #[arg(long)]
    unix_name: String,
}

struct Served {
    source: Pages,
    landing: Vec<Mutex<Pages>>,
}

/// Runs the server until its parent is gone.
pub async fn command(command: ReferenceCommand) -> anyhow::Result<bool> {
    let parent = rustix::process::getppid();
    let tcp = TcpListener::bind(&command.listen).with_context(|| format!("listen on {}", command.listen))?;
    let unix = UnixListener::bind_addr(&abstract_name(&command.unix_name)?).context("listen on a Unix socket")?;
    let source = working_set();
    let shared = sealed_file(&source)?;
    let landing = (0..BLOCKS).map(|_| Mutex::new(Pages::new(BLOCK_BYTES))).collect();
    let served = Arc::new(Served { source, landing });
    let slots = Arc::new(());
    println!("reference ready listen={}", tcp.local_addr()?);
    let tcp_slots = Arc::clone(&slots);
    std::thread::spawn(move || {
        for socket in tcp.incoming().flatten() {
            let (slot, served) = (Arc::clone(&tcp_slots), Arc::clone(&served));
            if Arc::strong_count(&slot) <= CONNECTIONS_MAX {
                // A connection ends with an error when the client closes it; that is nobody's fault.
                std::thread::spawn(move || (served.serve(socket).ok(), slot));
            }
        }
    });
    std::thread::spawn(move || {
        for socket in unix.incoming().flatten() {
            let slot = Arc::clone(&slots);
            let greeting = [u64::from(std::process::id()), shared.as_raw_fd() as u64];
            if Arc::strong_count(&slot) <= CONNECTIONS_MAX {
                std::thread::spawn(move || (place(socket, greeting).ok(), slot));
            }
        }
    });
    while rustix::process::getppid() == parent {
        tokio::time::sleep(PARENT_LOOK).await;
    }
    Ok(true)
}

fn abstract_name(name: &str) -> io::Result<SocketAddr> {
    // It leaves no file behind, however the server ends.
    SocketAddr::from_abstract_name(name)
}

/// Says where the shared memory is, then where each block that is asked for lies in it.
fn place(mut socket: UnixStream, greeting: [u64; 2]) -> io::Result<()> {
    socket.write_all(&greeting.map(u64::to_le_bytes).concat())?;
    let mut bytes = [0; REQUEST_BYTES];
    loop {
        socket.read_exact(&mut bytes)?;
        let offset = range(parse(bytes).1).start as u64;
        socket.write_all(&offset.to_le_bytes())?;
    }
}

impl Served {
    fn serve(&self, mut socket: TcpStream) -> io::Result<()> {
        socket.set_nodelay(true)?;
        let mut bytes = [0; REQUEST_BYTES];
        loop {
            socket.read_exact(&mut bytes)?;
            match parse(bytes) {
                (GET, block) => socket.write_all(&self.source[range(block)])?,
                (PUT, block) => {
                    socket.read_exact(&mut [0; HEADER_BYTES - REQUEST_BYTES])?;
                    let sums = receive_summed(&mut socket, &mut self.landing[block].lock())?;
                    socket.write_all(&answer(&sums))?;
                }
                _ => return Err(io::Error::other("not a request")),
            }
        }
    }
}

/// The answer to a put: that these bytes came, and whether they are the right ones.
pub(super) fn answer(sums: &ChunkSums) -> [u8; ANSWER_BYTES] {
    let mut sum = crc32fast::Hasher::new();
    for chunk in sums.as_slice() {
        sum.update(&chunk.to_le_bytes());
    }
    u64::from(sum.finalize()).to_le_bytes()
}

/// The running server; killed with the last reference to it.
pub struct Reference {
    node: Node,
    unix_name: String,
    _log: tempfile::TempDir,
}

impl Reference {
    /// Starts this program again as the server.
    pub async fn start() -> anyhow::Result<Arc<Self>> {
        let log = tempfile::tempdir().context("a folder for a log")?;
        let unix_name = format!("kvkeep-bench-{}-{:016x}", std::process::id(), rand::random::<u64>());
        let recipe = Recipe {
            program: std::env::current_exe().context("where is this program?")?,
            args: ["peers-reference", "--unix-name", &unix_name].map(Into::into).to_vec(),
            log: log.path().join("reference.log"),
        };
        Ok(Arc::new(Self { node: recipe.start("127.0.0.1:0").await?, unix_name, _log: log }))
    }

    /// A new connection over TCP.
    pub fn connect_tcp(&self) -> anyhow::Result<TcpStream> {
        let socket = TcpStream::connect(&self.node.listen).context("connect to the reference")?;
        socket.set_nodelay(true)?;
        Ok(socket)
    }

    /// A new connection over the Unix socket.
    pub fn connect_unix(&self) -> anyhow::Result<UnixStream> {
        UnixStream::connect_addr(&abstract_name(&self.unix_name)?).context("connect to the reference")
    }

    /// For the CPU clock.
    pub fn pid(&self) -> u32 {
        self.node.pid()
    }
}
