//! Where a node listens: addresses that may be `off`, and the place of its Unix socket.

use std::fmt;
use std::io;
use std::net::SocketAddr;
use std::path::{Path, PathBuf};
use std::str::FromStr;

use kvkeep_core::{Error, ErrorKind, Result};
use serde::{Deserialize, Serialize};

/// Longest path of a Unix socket, bytes: what the kernel's `sun_path` holds beside its final zero.
pub const SOCKET_PATH_BYTES_MAX: usize = 107;
/// Name of the socket in the data folder where nothing else is said.
pub const SOCKET_NAME: &str = "kvkeepd.sock";
/// Instead of a path: [`SOCKET_NAME`] in the data folder.
pub const AUTO: &str = "auto";
/// Instead of an address or a path: nowhere.
pub const OFF: &str = "off";

/// A TCP listener that need not be.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(try_from = "String", into = "String")]
pub enum TcpListen {
    /// Nowhere.
    Off,
    /// Here.
    At(SocketAddr),
}

impl TcpListen {
    /// The address, if there is one.
    pub fn address(self) -> Option<SocketAddr> {
        match self {
            Self::Off => None,
            Self::At(address) => Some(address),
        }
    }
}

impl FromStr for TcpListen {
    type Err = String;

    fn from_str(text: &str) -> std::result::Result<Self, String> {
        match text {
            OFF => Ok(Self::Off),
            _ => text.parse().map(Self::At).map_err(|_| {
                format!("`{text}` is no address; write one like 127.0.0.1:7070 (port 0 picks one), or `off`")
            }),
        }
    }
}

impl fmt::Display for TcpListen {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Off => f.write_str(OFF),
            Self::At(address) => address.fmt(f),
        }
    }
}

impl TryFrom<String> for TcpListen {
    type Error = String;

    fn try_from(text: String) -> std::result::Result<Self, String> {
        text.parse()
    }
}

impl From<TcpListen> for String {
    fn from(listen: TcpListen) -> Self {
        listen.to_string()
    }
}

/// Where the block port is.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(try_from = "String", into = "String")]
pub enum BlockListen {
    /// Beside the gRPC port.
    #[default]
    Beside,
    /// Nowhere.
    Off,
    /// Here.
    At(SocketAddr),
}

impl FromStr for BlockListen {
    type Err = String;

    fn from_str(text: &str) -> std::result::Result<Self, String> {
        match text {
            AUTO => Ok(Self::Beside),
            OFF => Ok(Self::Off),
            _ => text.parse().map(Self::At).map_err(|_| format!("{text:?} is no address:port, `auto` or `off`")),
        }
    }
}

impl TryFrom<String> for BlockListen {
    type Error = String;

    fn try_from(text: String) -> std::result::Result<Self, String> {
        text.parse()
    }
}

impl From<BlockListen> for String {
    fn from(listen: BlockListen) -> Self {
        match listen {
            BlockListen::Beside => AUTO.into(),
            BlockListen::Off => OFF.into(),
            BlockListen::At(address) => address.to_string(),
        }
    }
}

/// Where the Unix socket is, as an absolute path; empty: nowhere. `said` is `auto`, `off`, empty or a path. An automatic
/// path that no socket can have is told in the log and gone without: the node was not asked for it.
pub fn unix_socket(said: &Path, data_dir: &Path) -> PathBuf {
    let absolute = |path: &Path| std::path::absolute(path).unwrap_or_else(|_| path.to_path_buf());
    match said.to_str() {
        Some("" | OFF) => PathBuf::new(),
        Some(AUTO) => {
            let path = absolute(&data_dir.join(SOCKET_NAME));
            match fits(&path) {
                Ok(()) => path,
                Err(error) => {
                    tracing::warn!(%error, "no Unix socket");
                    PathBuf::new()
                }
            }
        }
        _ => absolute(said),
    }
}

/// Whether a socket can have this path.
pub fn fits(socket: &Path) -> Result<()> {
    let bytes = socket.as_os_str().len();
    if bytes <= SOCKET_PATH_BYTES_MAX {
        return Ok(());
    }
    Err(Error::new(
        ErrorKind::Config,
        "the path of a Unix socket has at most 107 bytes: name a shorter one with listen.unix (--unix-socket), \
         or say `off`",
    )
    .with("listen.unix", socket.display())
    .with("bytes", bytes))
}

/// The file of a bound socket. It is removed with this value, unless another server has put its own there meanwhile; one that
/// stays behind is replaced by the next start.
pub struct SocketFile {
    path: PathBuf,
    /// Device and inode.
    identity: (u64, u64),
}

impl SocketFile {
    /// Of a socket that was just bound.
    pub fn of(path: &Path) -> io::Result<Self> {
        Ok(Self { path: path.to_path_buf(), identity: identity(path)? })
    }
}

impl Drop for SocketFile {
    fn drop(&mut self) {
        if identity(&self.path).is_ok_and(|now| now == self.identity)
            && let Err(error) = std::fs::remove_file(&self.path)
        {
            tracing::debug!(path = %self.path.display(), %error, "the socket's file stays");
        }
    }
}

fn identity(path: &Path) -> io::Result<(u64, u64)> {
    use std::os::unix::fs::MetadataExt as _;
    let file = std::fs::symlink_metadata(path)?;
    Ok((file.dev(), file.ino()))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_listener_is_an_address_or_off_and_reads_back_what_it_shows() {
        for text in ["off", "127.0.0.1:7070", "[::1]:0"] {
            assert_eq!(text.parse::<TcpListen>().unwrap().to_string(), text);
        }
        for text in ["", "OFF", "7070", "localhost:7070", "auto"] {
            assert!(text.parse::<TcpListen>().is_err(), "{text}");
        }
    }

    #[test]
    fn the_socket_is_in_the_data_folder_unless_told_otherwise() {
        let at = |said: &str, data: &str| unix_socket(Path::new(said), Path::new(data));
        assert_eq!(at("auto", "/data"), Path::new("/data/kvkeepd.sock"));
        assert!(at("auto", "data").is_absolute());
        assert_eq!(at("off", "/data"), Path::new(""));
        assert_eq!(at("", "/data"), Path::new(""));
        assert_eq!(at("/run/kv.sock", "/data"), Path::new("/run/kv.sock"));
        assert_eq!(at("./auto", "/data").file_name(), Some("auto".as_ref()), "a path, not the word");
    }

    #[test]
    fn only_the_own_socket_is_removed() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join(SOCKET_NAME);
        std::fs::write(&path, "ours").unwrap();
        let ours = SocketFile::of(&path).unwrap();
        // Made before ours is gone, so that it cannot get the same inode.
        let other = folder.path().join("other");
        std::fs::write(&other, "another server's").unwrap();
        std::fs::rename(&other, &path).unwrap();
        drop(ours);
        assert!(path.exists());
        drop(SocketFile::of(&path).unwrap());
        assert!(!path.exists());
    }

    #[test]
    fn a_path_that_no_socket_can_have_is_gone_without_only_where_nobody_named_it() {
        let fitting = format!("/{}", "d".repeat(SOCKET_PATH_BYTES_MAX - SOCKET_NAME.len() - 2));
        let automatic = unix_socket(Path::new(AUTO), Path::new(&fitting));
        assert_eq!(automatic.as_os_str().len(), SOCKET_PATH_BYTES_MAX);
        let long = format!("{fitting}d");
        assert_eq!(unix_socket(Path::new(AUTO), Path::new(&long)), Path::new(""));
        let named = unix_socket(&Path::new(&long).join(SOCKET_NAME), Path::new("/data"));
        let error = fits(&named).unwrap_err();
        assert!(error.to_string().contains("listen.unix"), "{error}");
    }
}
