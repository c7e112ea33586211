//! Token ids and content.

use bytes::Bytes;
use kvkeep_client::Call;
use kvkeep_client::sessions::{Append, ContentPart};
use kvkeep_core::{Class, ErrorKind};
use kvkeep_tests::powercut::{Cut, PowerCut};
use kvkeep_tests::{Node, Options, payload};
use rand::rngs::StdRng;
use rand::{Rng as _, SeedableRng as _};

use super::super::is_refused;
use super::{namespace, open, sweep};

fn part(first_token: u64, tokens: u32, id: &str) -> ContentPart {
    ContentPart { first_token, tokens, content_id: Bytes::copy_from_slice(id.as_bytes()) }
}

#[tokio::test]
async fn token_ids_and_content_come_back_exactly_over_appends_and_restarts() {
    let mut rng = StdRng::seed_from_u64(kvkeep_tests::seed("token_ids_and_content_come_back"));
    let mut node = Node::start(Options::default());
    let ns = namespace(&node).await;
    let call = Call::default();
    open(&ns, "a", Class::Durable).await;
    let (mut ids, mut content) = (Vec::new(), Vec::new());
    for n in 0..40 {
        let first = ids.len() as u64;
        let new: Vec<u32> = (0..rng.random_range(10..500)).map(|_| rng.random()).collect();
        let parts = vec![part(first + 1, 7, &format!("image-{n}")), part(first + 8, 0, "x")];
        let wish = Append { from_token: first, token_ids: new.clone(), content: parts.clone(), ..Append::default() };
        let done = ns.sessions().append("a", &wish, &call).await.unwrap();
        ids.extend(new);
        content.extend(parts);
        assert_eq!(done.tokens, ids.len() as u64);
        if n % 7 == 0 {
            assert!(ns.sessions().append("a", &wish, &call).await.unwrap().repeated);
        }
    }
    // An append that is repeated finds its block, and leaves no lease over it behind.
    assert_eq!(ns.client().stats(&call).await.unwrap().leases, 0);
    for _ in 0..2 {
        let ns = namespace(&node).await;
        let all = ns.sessions().tokens_all("a", &call).await.unwrap();
        assert_eq!((&all.ids, &all.content, all.damaged, all.total), (&ids, &content, false, ids.len() as u64));
        // From anywhere, as many as asked.
        for _ in 0..40 {
            let first = rng.random_range(0..ids.len());
            let count = rng.random_range(1..1000);
            let end = ids.len().min(first + count);
            let some = ns.sessions().tokens("a", first as u64, count as u32, &call).await.unwrap();
            assert_eq!(some.ids, ids[first..end], "{first}..{end}");
            let here = content.iter().filter(|c| (first as u64..end as u64).contains(&c.first_token));
            assert_eq!(some.content, here.cloned().collect::<Vec<_>>(), "{first}..{end}");
        }
        assert!(ns.sessions().tokens("a", ids.len() as u64 + 5, 10, &call).await.unwrap().ids.is_empty());
        node.kill();
        super::super::restart::forget_memory(&node);
        node.restart();
    }
}

/// The device loses a block of token ids: what is before it comes, what is behind it does not, and that is said.
#[tokio::test]
async fn lost_token_ids_are_told_and_never_wrong() {
    let mut node =
        Node::new(Options { nvme: "warm_bytes_per_s = 0\nscrub_bytes_per_s = 0\n".into(), ..Options::default() });
    node.restart();
    let ns = namespace(&node).await;
    let call = Call::default();
    open(&ns, "a", Class::Durable).await;
    let ids: Vec<u32> = (0..3000).map(|n| payload::mix(n) as u32).collect();
    for (n, some) in ids.chunks(1000).enumerate() {
        let wish = Append { from_token: n as u64 * 1000, token_ids: some.to_vec(), ..Append::default() };
        ns.sessions().append("a", &wish, &call).await.unwrap();
    }
    node.kill();
    super::super::restart::forget_memory(&node);
    // One word of the second block, wherever it lies.
    let word = |at: usize| ids[at..at + 2].iter().flat_map(|id| id.to_le_bytes()).collect::<Vec<_>>();
    assert_eq!(flip(&node, &word(1500)), 1, "the block lies on the device once");
    node.restart();
    let ns = namespace(&node).await;
    let all = ns.sessions().tokens_all("a", &call).await.unwrap();
    assert_eq!((all.damaged, all.total), (true, 3000));
    assert_eq!(all.ids, ids[..1000]);
    let behind = ns.sessions().tokens("a", 2000, 1000, &call).await.unwrap();
    assert_eq!((behind.damaged, &behind.ids[..]), (false, &ids[2000..]), "what is behind it can be asked for");
    let found = node.client().await.admin().fsck(false, &call).await.unwrap();
    assert_eq!((found.missing_token_blocks, found.missing_positions), (1, 0), "{found:?}");
}

/// Flips a bit of these bytes wherever they stand in segment files; in how many places.
fn flip(node: &Node, bytes: &[u8]) -> usize {
    let mut flipped = 0;
    for name in kvkeep_tests::leaks::names(&node.segments_dir()) {
        let path = node.segments_dir().join(name);
        let mut data = std::fs::read(&path).unwrap();
        let at: Vec<_> = data.windows(bytes.len()).enumerate().filter(|(_, w)| *w == bytes).map(|(at, _)| at).collect();
        flipped += at.len();
        at.iter().for_each(|at| data[*at] ^= 1);
        if !at.is_empty() {
            std::fs::write(&path, data).unwrap();
        }
    }
    flipped
}

#[tokio::test]
async fn content_stands_within_the_token_ids_of_its_append() {
    let node = Node::start(Options::default());
    let ns = namespace(&node).await;
    open(&ns, "a", Class::Cache).await;
    let long = "x".repeat(129);
    let bad =
        [vec![part(3, 0, "")], vec![part(9, 2, "x")], vec![part(4, 1, "x"), part(3, 1, "y")], vec![part(3, 1, &long)]];
    for content in bad {
        let wish = Append { token_ids: (0..10).collect(), content, ..Append::default() };
        is_refused(ns.sessions().append("a", &wish, &Call::default()).await, ErrorKind::InvalidArgument);
    }
    assert_eq!(ns.sessions().get("a", &Call::default()).await.unwrap().tokens, 0);
}

/// Token ids are durable whatever the session is.
#[tokio::test]
async fn token_ids_of_a_cache_session_survive_the_loss_of_power() {
    let mut node = Node::new(Options::default());
    let power = match PowerCut::under(&mut node) {
        Ok(power) => power,
        Err(why) => return kvkeep_tests::skipped("token_ids_of_a_cache_session_survive", why),
    };
    node.restart();
    let ns = namespace(&node).await;
    open(&ns, "a", Class::Cache).await;
    let wish = Append { token_ids: (0..5000).collect(), ..Append::default() };
    ns.sessions().append("a", &wish, &Call::default()).await.unwrap();
    power.cut(&mut node, Cut::Everything);
    node.restart();
    let ns = namespace(&node).await;
    assert_eq!(ns.sessions().tokens_all("a", &Call::default()).await.unwrap().ids, wish.token_ids);
    let client = node.client().await;
    sweep(&client).await;
    let found = sweep(&client).await;
    assert_eq!((found.unreferenced_blocks, found.missing_token_blocks), (0, 0), "{found:?}");
}
