//! What the arena's tests share.

use std::path::{Path, PathBuf};
use std::time::Duration;

use kvkeep_core::ids::{BlockId, DigestKey, GroupId, Handle, Key, KeyDomain, NamespaceId, Revision, ShardId, TenantId};
use kvkeep_core::{BlockMeta, ChunkSums, Class, Fidelity, SlotRef, Version};
use kvkeep_tiers::dram::{Arena, ArenaConfig, NoRoom, NoRoomReason, Purpose, Reserved};
use tempfile::TempDir;

pub const KIB: u64 = 1024;
pub const MIB: u64 = 1024 * 1024;
/// How long a test waits for the thread that makes files. Only a broken arena takes that long.
pub const GROW_WAIT: Duration = Duration::from_secs(60);

/// A folder on tmpfs where there is one.
pub fn folder() -> TempDir {
    let shm = Path::new("/dev/shm");
    let base = if shm.is_dir() { shm.to_path_buf() } else { std::env::temp_dir() };
    tempfile::Builder::new().prefix("kvkeep-arena-test").tempdir_in(base).unwrap()
}

/// An arena of a few small files: 2 MiB each where the capacity is 8 MiB.
pub fn config(dir: &Path) -> ArenaConfig {
    ArenaConfig::new(dir.join("arena"), 8 * MIB, 512 * KIB)
}

pub fn open(config: &ArenaConfig) -> Arena {
    Arena::open(config.clone(), &mut |_, _| true).unwrap()
}

pub fn open_empty(config: &ArenaConfig) -> Arena {
    let arena = Arena::open(config.clone(), &mut |_, _| panic!("nothing was left here")).unwrap();
    assert!(arena.wait_settled(GROW_WAIT));
    arena
}

/// Payload number `n`: no two alike.
pub fn payload(n: u64, len: usize) -> Vec<u8> {
    let word = |i: u64| ((n + 1) << 32 | i).wrapping_mul(0x9e37_79b9_7f4a_7c15).rotate_left(23);
    let mut bytes: Vec<u8> = (0..len.div_ceil(8) as u64).flat_map(|i| word(i).to_le_bytes()).collect();
    bytes.truncate(len);
    bytes
}

/// The facts of block number `n`.
pub fn meta(n: u64, tenant: TenantId, bytes: &[u8]) -> BlockMeta {
    let key = Key::new(&[n.to_le_bytes(), (n * 3).to_le_bytes()].concat()[..1 + (n as usize % 16)]).unwrap();
    let handle = Handle { namespace: NamespaceId(7 + n as u32 % 5), revision: Revision(1) };
    let secret = DigestKey::from_bytes([5; 16]);
    let digest = |n: u64| secret.digest(KeyDomain(1), handle, &n.to_le_bytes());
    BlockMeta {
        id: BlockId { digest: digest(n), group: GroupId(n as u16 % 3), shard: ShardId(n as u16 % 8) },
        tenant,
        handle,
        key,
        version: Version(n + 1),
        class: if n.is_multiple_of(2) { Class::Cache } else { Class::Durable },
        keeper: kvkeep_core::words::Keeper::Caller,
        fidelity: Fidelity::Exact,
        position: n as u32,
        parent: (!n.is_multiple_of(4)).then(|| digest(n - 1)),
        len: bytes.len() as u32,
        sums: ChunkSums::of(bytes),
    }
}

/// Reserves, waiting for files that are being made.
pub fn reserve(arena: &Arena, tenant: TenantId, len: usize, purpose: Purpose) -> Result<Reserved, NoRoom> {
    for _ in 0..100 {
        match arena.reserve(tenant, len as u32, purpose) {
            Err(NoRoom { reason: NoRoomReason::Growing, .. }) => assert!(arena.wait_settled(GROW_WAIT)),
            answer => return answer,
        }
    }
    panic!("the arena says it grows and does not");
}

/// Stores block number `n`.
pub fn put(arena: &Arena, tenant: TenantId, n: u64, len: usize) -> Result<SlotRef, NoRoom> {
    let mut reserved = reserve(arena, tenant, len, Purpose::Put)?;
    let bytes = payload(n, len);
    reserved.write_at(0, &bytes).unwrap();
    Ok(reserved.publish(&meta(n, tenant, &bytes)).unwrap())
}

/// Asserts that a slot holds block number `n`, every byte and every fact.
pub fn assert_holds(arena: &Arena, slot: SlotRef, tenant: TenantId, n: u64, len: usize) {
    let pinned = arena.pin(slot).expect("it was never freed");
    let bytes = payload(n, len);
    let facts = meta(n, tenant, &bytes);
    assert!(*pinned == *bytes, "bytes of block {n}");
    assert_eq!(pinned.meta().unwrap(), facts);
    assert!(pinned.holds(&facts.id, facts.key.as_bytes()));
    assert!(!pinned.holds(&facts.id, b"another key, longer than any here"));
    assert_eq!(arena.verify(slot, || {}), Some(true));
    let io = pinned.io_buf();
    assert_eq!(io.len(), len.next_multiple_of(4096));
    assert!(io.as_slice()[len..].iter().all(|b| *b == 0), "the padding is zero");
}

/// The sums that hold at any moment.
pub fn assert_adds_up(arena: &Arena) {
    let u = arena.usage();
    assert_eq!(
        u.file_bytes,
        u.building_bytes + u.metadata_bytes + u.used_bytes + u.quarantined_bytes + u.free_slot_bytes + u.hole_bytes,
        "{u:?}"
    );
    assert_eq!(u.capacity_bytes, u.metadata_bytes + u.used_bytes + u.quarantined_bytes + u.free_bytes, "{u:?}");
    assert!(u.file_bytes <= u.capacity_bytes, "{u:?}");
    assert_eq!(u.used_bytes, u.tenants.iter().map(|t| t.used_bytes).sum::<u64>(), "{u:?}");
    assert_eq!(u.blocks, u.tenants.iter().map(|t| t.blocks).sum::<u64>(), "{u:?}");
}

/// The arena files in the folder.
pub fn files(config: &ArenaConfig) -> Vec<PathBuf> {
    let mut files: Vec<PathBuf> = std::fs::read_dir(&config.dir)
        .unwrap()
        .map(|e| e.unwrap().path())
        .filter(|p| p.extension().is_some_and(|e| e == "slots"))
        .collect();
    files.sort();
    files
}
