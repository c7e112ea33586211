//! Takes changes back, newest first.

use std::collections::{BTreeMap, HashMap};
use std::fs::{self, File};
use std::io;
use std::os::unix::fs::{FileExt as _, MetadataExt as _};
use std::path::{Path, PathBuf};

use rand::rngs::StdRng;
use rand::{Rng as _, SeedableRng as _};

use super::Cut;
use super::log::{Record, What};

/// What arrives or does not as one, bytes.
const PAGE_BYTES: u64 = 4096;

/// What a cut took.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Lost {
    /// Changes of bytes that no flush covered.
    pub changes_at_risk: u64,
    /// Pages that such changes touched.
    pub pages_at_risk: u64,
    /// Of these, pages that lost at least one change.
    pub pages_lost: u64,
    /// Changes of names that no flush covered.
    pub names_at_risk: u64,
    /// Of these, those that were taken back.
    pub names_lost: u64,
}

/// What happens to changes that no flush covered.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Mood {
    LoseAll,
    KeepAll,
    /// Page by page.
    Mix,
}

fn mood(rng: &mut StdRng) -> Mood {
    match rng.random_range(0..8) {
        0..3 => Mood::LoseAll,
        3 => Mood::KeepAll,
        _ => Mood::Mix,
    }
}

/// How many of `changes`, in order, survive.
fn survivors(mood: Mood, changes: usize, rng: &mut StdRng) -> usize {
    match mood {
        Mood::LoseAll => 0,
        Mood::KeepAll => changes,
        Mood::Mix => rng.random_range(0..=changes),
    }
}

/// Takes back a part of what no flush covered, below `watched`.
pub(super) fn undo(records: &[Record], watched: &Path, graves: &Path, cut: Cut) -> Lost {
    let (rng, everything) = match cut {
        Cut::Everything => (&mut StdRng::seed_from_u64(0), true),
        Cut::Seeded(seed) => (&mut StdRng::seed_from_u64(seed), false),
    };
    let mut lost = Lost::default();
    let mut covered: HashMap<(u64, bool), u64> = HashMap::new();
    for record in records {
        if let What::Flush { names, covers } = record.what {
            let at = covered.entry((record.inode, names)).or_default();
            *at = covers.max(*at);
        }
    }
    let at_risk = |record: &&Record, names: bool| {
        record.number > covered.get(&(record.inode, names)).copied().unwrap_or_default()
    };
    let mut files: BTreeMap<u64, Vec<&Record>> = BTreeMap::new();
    let mut folders: BTreeMap<u64, Vec<&Record>> = BTreeMap::new();
    for record in records {
        match record.what {
            What::Flush { .. } => {}
            What::Bytes { .. } if at_risk(&record, false) => files.entry(record.inode).or_default().push(record),
            What::Bytes { .. } => {}
            _ if at_risk(&record, true) => folders.entry(record.inode).or_default().push(record),
            _ => {}
        }
    }
    // First bytes, while every file is still where the log's inodes can find it; then names.
    let mut paths = HashMap::new();
    find_inodes(watched, &mut paths);
    find_inodes(graves, &mut paths);
    let whole = if everything { Mood::LoseAll } else { mood(rng) };
    let one = |rng: &mut StdRng| if whole == Mood::Mix { mood(rng) } else { whole };
    for (inode, changes) in files {
        let mood = one(rng);
        lost.changes_at_risk += changes.len() as u64;
        if let Some(path) = paths.get(&inode) {
            undo_bytes(path, &changes, mood, rng, &mut lost);
        }
    }
    let mut taken_back = Vec::new();
    for (_, changes) in folders {
        let kept = survivors(one(rng), changes.len(), rng);
        lost.names_at_risk += changes.len() as u64;
        taken_back.extend_from_slice(&changes[kept..]);
    }
    taken_back.sort_by_key(|record| std::cmp::Reverse(record.number));
    lost.names_lost = taken_back.len() as u64;
    for record in taken_back {
        undo_name(&record.what).unwrap_or_else(|e| panic!("cannot take back {:?}: {e}", record.what));
    }
    lost
}

fn find_inodes(folder: &Path, paths: &mut HashMap<u64, PathBuf>) {
    for entry in fs::read_dir(folder).into_iter().flatten().filter_map(Result::ok) {
        let Ok(meta) = entry.metadata() else { continue };
        if meta.is_dir() {
            find_inodes(&entry.path(), paths);
        } else {
            paths.entry(meta.ino()).or_insert_with(|| entry.path());
        }
    }
}

/// One change of bytes, as the log has it.
#[derive(Clone, Copy)]
struct Change<'a> {
    offset: u64,
    bytes: u64,
    before: &'a [u8],
}

impl Change<'_> {
    /// Writes what page `page` held before this change.
    fn restore(self, file: &File, page: u64) -> io::Result<()> {
        let start = self.offset.max(page * PAGE_BYTES);
        let end = (self.offset + self.bytes).min((page + 1) * PAGE_BYTES);
        let at = (start - self.offset) as usize;
        let mut old = vec![0; (end - start) as usize];
        let known = self.before.get(at..).unwrap_or_default();
        let known = &known[..known.len().min(old.len())];
        old[..known.len()].copy_from_slice(known);
        file.write_all_at(&old, start)
    }
}

/// Sizes change in order, so some first of them survive; a page has its own survivors, except that a truncation happens
/// to all of its pages or to none.
fn undo_bytes(path: &Path, records: &[&Record], mood: Mood, rng: &mut StdRng, lost: &mut Lost) {
    let file = File::options().read(true).write(true).open(path).expect("a file of the node can be opened");
    let mut sizes = Vec::new();
    let mut pages: BTreeMap<u64, Vec<usize>> = BTreeMap::new();
    let mut changes = Vec::new();
    let mut truncations = Vec::new();
    for (i, record) in records.iter().enumerate() {
        let What::Bytes { offset, bytes, old_size, new_size, before, truncates } = &record.what else { continue };
        if old_size != new_size {
            sizes.push((i, *old_size));
        }
        if *bytes > 0 {
            for page in offset / PAGE_BYTES..(offset + bytes).div_ceil(PAGE_BYTES) {
                pages.entry(page).or_default().push(i);
            }
        }
        changes.push(Change { offset: *offset, bytes: *bytes, before });
        truncations.push(*truncates);
    }
    let sizes_kept = survivors(mood, sizes.len(), rng);
    // The first change of size that is taken back, and the size before it.
    let resized = sizes.get(sizes_kept).copied();
    lost.pages_at_risk += pages.len() as u64;
    for (page, touched) in &pages {
        let mut kept = survivors(mood, touched.len(), rng);
        for (nth, i) in touched.iter().enumerate().filter(|(_, i)| truncations[**i]) {
            match resized {
                Some((first, _)) if *i >= first => kept = kept.min(nth),
                _ => kept = kept.max(nth + 1),
            }
        }
        lost.pages_lost += u64::from(kept < touched.len());
        for i in touched[kept..].iter().rev() {
            changes[*i].restore(&file, *page).expect("a page can be written back");
        }
    }
    if let Some((_, size)) = resized {
        file.set_len(size).expect("the size can be set back");
    }
}

/// A change that was announced and not made (the kill came between) is left alone.
fn undo_name(what: &What) -> io::Result<()> {
    match what {
        What::Create(path) => gone_is_fine(fs::remove_file(path)),
        What::Unlink { path, grave } if !path.exists() => fs::hard_link(grave, path),
        What::Rename { from, to, grave } if !from.exists() && to.exists() => {
            fs::rename(to, from)?;
            grave.as_ref().map_or(Ok(()), |grave| fs::hard_link(grave, to))
        }
        What::MakeFolder(path) => gone_is_fine(fs::remove_dir_all(path)),
        What::RemoveFolder(path) if !path.exists() => fs::create_dir(path),
        What::Unlink { .. } | What::Rename { .. } | What::RemoveFolder(_) => Ok(()),
        What::Bytes { .. } | What::Flush { .. } => unreachable!("only changes of names are taken back here"),
    }
}

fn gone_is_fine(result: io::Result<()>) -> io::Result<()> {
    match result {
        Err(e) if e.kind() == io::ErrorKind::NotFound => Ok(()),
        other => other,
    }
}
