//! Where `kvkeepd` is.

use std::ffi::OsStr;
use std::path::{Path, PathBuf};

use crate::error::{Error, Result};

/// Names the program; wins over every place where it is looked for.
pub const KVKEEPD_VARIABLE: &str = "KVKEEP_KVKEEPD";
const NAME: &str = "kvkeepd";

/// The program to start: the one that [`KVKEEPD_VARIABLE`] names, the one beside this program (or a folder higher, where
/// cargo puts tests and examples), or the first on the `PATH`.
pub(super) fn find() -> Result<PathBuf> {
    let named = std::env::var_os(KVKEEPD_VARIABLE).filter(|name| !name.is_empty());
    let own = std::env::current_exe().ok();
    let path = std::env::var_os("PATH");
    find_in(named.as_deref(), own.as_deref(), path.as_deref())
}

fn find_in(named: Option<&OsStr>, own: Option<&Path>, path: Option<&OsStr>) -> Result<PathBuf> {
    if let Some(named) = named {
        // Absolute, because it is run in another folder.
        let program = std::path::absolute(named).unwrap_or_else(|_| named.into());
        return match program.is_file() {
            true => Ok(program),
            false => Err(Error::config("KVKEEP_KVKEEPD names no file").with("file", program.display())),
        };
    }
    let beside = own.and_then(Path::parent).into_iter().flat_map(|folder| [Some(folder), folder.parent()]).flatten();
    let on_path = path.into_iter().flat_map(std::env::split_paths).filter(|folder| folder.is_absolute());
    let places: Vec<PathBuf> = beside.map(Path::to_path_buf).chain(on_path).map(|folder| folder.join(NAME)).collect();
    places.iter().find(|program| program.is_file()).cloned().ok_or_else(|| {
        let looked: Vec<_> = places.iter().map(|p| p.display().to_string()).collect();
        Error::config(
            "kvkeepd was not found: install it beside this program or on the PATH, or name it with KVKEEP_KVKEEPD",
        )
        .with("looked_for", looked.join(", "))
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_named_program_wins_then_the_one_beside_then_the_path() {
        let folder = std::env::temp_dir().join(format!("kvkeep-binary-{}", rand::random::<u32>()));
        let make = |name: &str| {
            let program = folder.join(name);
            std::fs::create_dir_all(program.parent().unwrap()).unwrap();
            std::fs::write(&program, "").unwrap();
            program
        };
        let own = make("debug/deps/test-0123");
        let path = std::env::join_paths([folder.join("empty"), folder.join("bin")]).unwrap();
        let found = |named: Option<&OsStr>| find_in(named, Some(&own), Some(&path));

        let error = found(None).unwrap_err().to_string();
        for place in ["debug/deps/kvkeepd", "debug/kvkeepd", "empty/kvkeepd", "bin/kvkeepd"] {
            assert!(error.contains(place), "{place}: {error}");
        }
        let on_path = make("bin/kvkeepd");
        assert_eq!(found(None).unwrap(), on_path);
        let above = make("debug/kvkeepd");
        assert_eq!(found(None).unwrap(), above);
        let beside = make("debug/deps/kvkeepd");
        assert_eq!(found(None).unwrap(), beside);
        let named = make("elsewhere/server");
        assert_eq!(found(Some(named.as_os_str())).unwrap(), named);
        let error = found(Some(folder.join("nothing").as_os_str())).unwrap_err().to_string();
        assert!(error.contains("KVKEEP_KVKEEPD") && error.contains("nothing"), "{error}");
        std::fs::remove_dir_all(&folder).unwrap();
    }
}
