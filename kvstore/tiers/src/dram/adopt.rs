//! Files of a previous life: keep what is right in every bit, remove the rest before new memory is asked for.

use std::fs::{self, File, OpenOptions};
use std::io;
use std::os::unix::fs::FileExt as _;
use std::path::PathBuf;
use std::sync::Arc;
use std::sync::atomic::{AtomicU32, AtomicUsize, Ordering};
use std::time::{Duration, Instant};

use kvkeep_core::slot_entry::STATE_PUBLISHED;
use kvkeep_core::{BlockMeta, Result, SlotRef};
use parking_lot::Mutex;

use super::FILE_BYTES_MAX;
use super::arena::Shared;
use super::file::{ArenaFile, Cell};
use super::grow::{index_of, io_error, path_of};
use super::layout::{
    EXTENTS_MAX, FileHeader, HEADER_BYTES, RECORD_BYTES, Shape, decode_entry, entry_state, slot_units,
};
use super::memory::{Mapping, Reading, Taken, UNIT_BYTES};
use super::slot::{FILES_MAX, GENERATION_MAX, Purpose, SlotAt, SlotEnd};

/// Threads that verify payload at start.
const VERIFY_THREADS_MAX: usize = 8;

/// What the arena found when it was opened.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct AdoptionReport {
    /// Arena files in the folder.
    pub files_found: u64,
    /// Of these: kept.
    pub files_adopted: u64,
    /// Removed: of another layout version, of a wrong size, spare, over the capacity, or without a block worth keeping.
    pub files_removed: u64,
    /// Blocks offered to the caller: right in every bit.
    pub offered: u64,
    /// Of these: taken.
    pub adopted: u64,
    /// Of these: refused.
    pub refused: u64,
    /// Entries that said published and were not right.
    pub torn: u64,
    /// Blocks whose payload did not match its sums.
    pub damaged: u64,
    /// Payload bytes of the adopted blocks.
    pub bytes: u64,
    /// How long it took, verification included.
    pub took: Duration,
}

/// A published slot that was found.
struct Found {
    start: u32,
    slot: u32,
    at: SlotAt,
    meta: BlockMeta,
    memory: Taken,
}

struct Examined {
    file: Box<ArenaFile>,
    found: Vec<Found>,
    /// The largest generation of any entry, in use or not.
    generation: u64,
    torn: u64,
    damaged: u64,
}

/// Takes over the folder's files; asks `offer` for each good block, in the caller's thread.
pub(super) fn adopt(
    shared: &Arc<Shared>,
    offer: &mut dyn FnMut(&BlockMeta, SlotRef) -> bool,
) -> Result<AdoptionReport> {
    let began = Instant::now();
    let mut report = AdoptionReport::default();
    let kept = keep_what_belongs(shared, &mut report)?;
    for examined in examine_all(shared, &kept) {
        let examined = match examined {
            Ok(examined) => examined,
            Err((path, error)) => {
                tracing::warn!(path = %path.display(), %error, "an arena file cannot be adopted");
                remove(&path, &mut report)?;
                continue;
            }
        };
        install(shared, examined, offer, &mut report)?;
    }
    report.took = began.elapsed();
    Ok(report)
}

fn remove(path: &PathBuf, report: &mut AdoptionReport) -> Result<()> {
    fs::remove_file(path).map_err(|e| io_error("cannot remove an arena file", path, &e))?;
    report.files_removed += 1;
    Ok(())
}

/// Removes the files that do not belong, and returns the headers of the others, lowest index first.
fn keep_what_belongs(shared: &Shared, report: &mut AdoptionReport) -> Result<Vec<(u16, FileHeader)>> {
    let dir = &shared.config.dir;
    let names = fs::read_dir(dir).map_err(|e| io_error("cannot list the arena's folder", dir, &e))?;
    let mut indices: Vec<u16> =
        names.filter_map(|n| n.ok()).filter_map(|n| index_of(n.file_name().to_str()?)).collect();
    indices.sort_unstable();
    let (mut kept, mut bytes) = (Vec::new(), 0);
    for index in indices {
        report.files_found += 1;
        let path = path_of(dir, index);
        match header_of(&path) {
            Some(header) if usize::from(index) < FILES_MAX && bytes + header.bytes <= shared.config.capacity_bytes => {
                bytes += header.bytes;
                kept.push((index, header));
            }
            _ => remove(&path, report)?,
        }
    }
    Ok(kept)
}

/// The header, where it is right and the file has the size it says.
fn header_of(path: &PathBuf) -> Option<FileHeader> {
    let file = File::open(path).ok()?;
    let facts = file.metadata().ok().filter(fs::Metadata::is_file)?;
    let mut unit = [0; HEADER_BYTES];
    file.read_exact_at(&mut unit, 0).ok()?;
    let header = FileHeader::decode(&unit)?;
    let whole = header.bytes.is_multiple_of(UNIT_BYTES as u64) && header.bytes <= FILE_BYTES_MAX;
    (whole && facts.len() == header.bytes).then_some(header)
}

type Answer = Result<Examined, (PathBuf, io::Error)>;

/// Maps and verifies the files, some at a time.
fn examine_all(shared: &Shared, kept: &[(u16, FileHeader)]) -> Vec<Answer> {
    let next = AtomicUsize::new(0);
    let answers: Mutex<Vec<(u16, Answer)>> = Mutex::new(Vec::new());
    let threads = std::thread::available_parallelism().map_or(1, usize::from).min(VERIFY_THREADS_MAX).min(kept.len());
    std::thread::scope(|scope| {
        for _ in 0..threads {
            scope.spawn(|| {
                while let Some((index, header)) = kept.get(next.fetch_add(1, Ordering::Relaxed)) {
                    let answer = examine(shared, *index, header);
                    let answer = answer.map_err(|e| (path_of(&shared.config.dir, *index), e));
                    answers.lock().push((*index, answer));
                }
            });
        }
    });
    let mut answers = answers.into_inner();
    answers.sort_unstable_by_key(|(index, _)| *index);
    answers.into_iter().map(|(_, answer)| answer).collect()
}

fn examine(shared: &Shared, index: u16, header: &FileHeader) -> io::Result<Examined> {
    let path = path_of(&shared.config.dir, index);
    let file = OpenOptions::new().read(true).write(true).open(&path)?;
    let len = usize::try_from(header.bytes).map_err(io::Error::other)?;
    let mapping = Mapping::new(&file, len, index, shared.config.huge_pages, shared.lock.clone())?;
    let mut file = ArenaFile::new(Arc::clone(&mapping), path, header.nonce)
        .ok_or_else(|| io::Error::other("the file is too short"))?;
    file.adopt_header(header);
    let (mut found, mut last, mut torn, mut damaged) = (Vec::new(), 0, 0, 0);
    for record in 0..EXTENTS_MAX {
        let at = HEADER_BYTES + record * RECORD_BYTES;
        let shape = Shape::decode(&file.header_bytes()[at..at + RECORD_BYTES], header.nonce, record, file.units());
        let Some(start) = shape.and_then(|shape| file.adopt_extent(shape, record)) else { continue };
        let extent = file.extents.get_mut(&start).expect("adopted the line before");
        for slot in 0..extent.shape.slots {
            let unit = extent.shape.slot_unit(slot);
            let right = decode_entry(extent.entry(slot), header.nonce, unit, extent.shape.slot_bytes())
                .filter(|(generation, meta)| (1..=GENERATION_MAX).contains(generation) && meta.tenant == header.tenant);
            // Of slots that were freed, too: a process that mapped the file in the previous life may still compare with it.
            last = right.as_ref().map_or(last, |(generation, _)| last.max(*generation));
            if entry_state(extent.entry(slot)) != STATE_PUBLISHED {
                continue;
            }
            let memory = right.as_ref().and_then(|(_, meta)| mapping.take(unit, slot_units(u64::from(meta.len))));
            let (Some((generation, meta)), Some(mut memory)) = (right, memory) else {
                torn += 1;
                extent.clear_entry(slot);
                continue;
            };
            if !meta.sums.matches(&memory.bytes()[..meta.len as usize]) {
                damaged += 1;
                extent.clear_entry(slot);
                continue;
            }
            // No sum covers the padding, and it goes to disk with the payload.
            memory.bytes_mut()[meta.len as usize..].fill(0);
            found.push(Found { start, slot, at: SlotAt { file: index, unit, generation }, meta, memory });
        }
    }
    Ok(Examined { file: Box::new(file), found, generation: last, torn, damaged })
}

/// Offers a file's blocks and puts the file, with those that were taken, into the state.
fn install(
    shared: &Arc<Shared>,
    examined: Examined,
    offer: &mut dyn FnMut(&BlockMeta, SlotRef) -> bool,
    report: &mut AdoptionReport,
) -> Result<()> {
    let Examined { mut file, found, generation, torn, damaged } = examined;
    report.torn += torn;
    report.damaged += damaged;
    let (mut used, mut payload, mut blocks) = (0, 0, 0);
    for Found { start, slot, at, meta, memory } in found {
        report.offered += 1;
        let extent = file.extents.get_mut(&start).expect("its slots were found there");
        if !offer(&meta, at.pack()) {
            report.refused += 1;
            extent.clear_entry(slot);
            continue;
        }
        let slot_bytes = extent.shape.slot_bytes();
        let end = SlotEnd {
            shared: Arc::downgrade(shared),
            gauge: Arc::clone(&shared.gauge),
            at,
            tenant: meta.tenant,
            purpose: Purpose::Put,
            len: meta.len,
            slot_bytes,
            nonce: file.nonce,
            pins: AtomicU32::new(0),
        };
        extent.cells[slot as usize] = Cell::Published(Reading::new(memory, end));
        extent.live += 1;
        used += slot_bytes;
        payload += u64::from(meta.len);
        blocks += 1;
    }
    report.adopted += blocks;
    report.bytes += payload;
    let empty: Vec<u32> = file.extents.iter().filter(|(_, e)| e.is_empty()).map(|(start, _)| *start).collect();
    for start in empty {
        file.dissolve(start);
    }
    let (Some(tenant), false) = (file.tenant, file.extents.is_empty()) else {
        let path = file.path.clone();
        drop(file);
        return remove(&path, report);
    };
    report.files_adopted += 1;
    let index = file.mapping.index();
    let mut state = shared.state.lock();
    let window = state.window;
    state.file_bytes += file.bytes();
    let mut extents = Vec::new();
    for (start, extent) in &mut file.extents {
        let cells = &extent.cells;
        extent.free = (0..extent.shape.slots).rev().filter(|s| matches!(cells[*s as usize], Cell::Free)).collect();
        extent.touched = window;
        extents.push((*start, extent.shape.slot_units, extent.free.len() as u64, extent.table_bytes()));
    }
    state.install(file);
    for (start, units, free, table) in extents {
        state.metadata_bytes += table;
        state.count_extent(tenant, units, free, (index, start));
    }
    state.used_bytes += used;
    state.payload_bytes += payload;
    state.next_generation = if generation >= GENERATION_MAX { 1 } else { state.next_generation.max(generation + 1) };
    let domain = state.domains.entry(tenant).or_default();
    domain.used_bytes += used;
    domain.blocks += blocks;
    Ok(())
}
