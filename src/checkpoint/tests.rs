use std::collections::BTreeMap;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use async_trait::async_trait;
use futures::stream::BoxStream;
use object_store::memory::InMemory;
use object_store::path::Path;
use object_store::{
    CopyOptions, GetOptions, GetResult, ListResult, MultipartUpload, ObjectMeta, ObjectStore, ObjectStoreExt, PutMode,
    PutMultipartOptions, PutOptions, PutPayload, PutResult,
};

use super::*;
use crate::batch::{OffsetRange, TopicPartition, Watermarks};
use crate::error::Kind;
use crate::window::watermark::EventTimeProgress;

fn memory() -> Location {
    Location { store: Arc::new(InMemory::new()), prefix: Path::from("base/ck"), url: "memory:///base/ck".into() }
}

fn local(folder: &std::path::Path) -> Location {
    let store = object_store::local::LocalFileSystem::new_with_prefix(folder).unwrap();
    Location { store: Arc::new(store), prefix: Path::default(), url: format!("file://{}", folder.display()) }
}

fn plan(batch: BatchId, epoch: u64) -> MicroBatch {
    MicroBatch {
        batch,
        epoch,
        trigger_time_ms: 1_700_000_000_000,
        config_fingerprint: "fingerprint".into(),
        ranges: [(TopicPartition::new("t", 0), OffsetRange { start: 10, end: 20 })].into(),
        gaps: Vec::new(),
        topic_ids: BTreeMap::new(),
        watermarks: Watermarks::default(),
        left_behind: BTreeMap::new(),
        held_by: None,
        tables: BTreeMap::new(),
    }
}

fn commit(plan: &LoggedPlan, state: &[StateFile]) -> CommitEntry {
    CommitEntry {
        batch: plan.plan.batch,
        epoch: plan.plan.epoch,
        plan_digest: plan.digest.clone(),
        watermark_next_ms: Some(-1),
        event_times: EventTimeProgress::default(),
        reread: None,
        windows: WindowStates::default(),
        definition: crate::config::Definition::default(),
        state: state.to_vec(),
        snapshots: [("ns.rows".to_string(), Some(i64::MAX)), ("ns.windows".to_string(), None)].into(),
        counts: Counts {
            records: 10,
            rows: 9,
            dead_letters: BTreeMap::from([("malformed_json".into(), 1)]),
            ..Counts::default()
        },
        committed_at_ms: 1,
        dead_letter_topic: None,
    }
}

/// Runs batches `from..to`, each with one state file; the state is the newest two files.
async fn run_batches(checkpoint: &Checkpoint, from: u64, to: u64) -> Vec<StateFile> {
    let mut live = Vec::new();
    for batch in from..to {
        let logged = checkpoint.log_plan(&plan(batch, 1)).await.unwrap();
        let bytes = format!("state of {batch}").into_bytes();
        live.push(checkpoint.put_state(batch, Uuid::new_v4(), StateKind::Delta, bytes, 0, None).await.unwrap());
        live.drain(..live.len().saturating_sub(2));
        checkpoint.log_commit(&commit(&logged, &live)).await.unwrap();
    }
    live
}

async fn files(location: &Location) -> Vec<String> {
    Files::new(location.clone()).list("").await.unwrap().into_iter().map(|e| e.file).collect()
}

async fn overwrite(location: &Location, file: &str, bytes: &[u8]) {
    let path = file.split('/').fold(location.prefix.clone(), |path, part| path.join(part));
    location.store.put(&path, bytes.to_vec().into()).await.unwrap();
}

async fn remove(location: &Location, file: &str) {
    Files::new(location.clone()).delete(file).await.unwrap();
}

/// What every store has to make possible. The location is empty.
async fn conformance(location: Location) {
    assert_eq!(Checkpoint::inspect(location.clone()).await.unwrap(), None);
    let mut checkpoint = Checkpoint::open(location.clone(), "p").await.unwrap();
    assert!(checkpoint.is_new());
    assert_eq!(checkpoint.url(), location.url);
    let metadata = Checkpoint::inspect(location.clone()).await.unwrap().unwrap();
    assert_eq!((metadata.query_id, metadata.pipeline.as_str()), (checkpoint.query_id(), "p"));

    // Ownership.
    assert_eq!(checkpoint.claim().await.unwrap(), 1);
    checkpoint.check_owner().await.unwrap();
    let mut successor = Checkpoint::open(location.clone(), "p").await.unwrap();
    assert!(!successor.is_new());
    assert_eq!(successor.query_id(), checkpoint.query_id());
    assert_eq!(successor.claim().await.unwrap(), 2);
    successor.check_owner().await.unwrap();
    let other = checkpoint.check_owner().await.unwrap_err();
    assert!(matches!(other, Error::OtherOwner { ours: 1, epoch: 2, .. }));
    assert_eq!(other.kind(), Kind::Fatal);
    assert!(other.to_string().contains(&format!("process {}", std::process::id())), "{other}");

    // A batch: plan, replay, commit.
    assert_eq!(checkpoint.recover().await.unwrap(), Recovered::default());
    let logged = successor.log_plan(&plan(0, 2)).await.unwrap();
    assert_eq!(successor.log_plan(&plan(0, 2)).await.unwrap(), logged, "a retried put");
    let superseded = checkpoint.log_plan(&plan(0, 1)).await.unwrap_err();
    assert!(matches!(superseded, Error::Superseded { epoch: 2, .. }));
    assert_eq!(superseded.kind(), Kind::Transient);
    let recovered = successor.recover().await.unwrap();
    assert_eq!(recovered.replay(), Some(&logged));
    assert_eq!(recovered.commit, None);

    let state = successor.put_state(0, Uuid::new_v4(), StateKind::Run(0), vec![1, 2, 3], 0, Some(7)).await.unwrap();
    assert_eq!(successor.open_state(&state, 100).await.unwrap(), vec![1, 2, 3]);
    assert_eq!(successor.open_state(&state, 2).await.unwrap(), vec![2, 3]);
    assert_eq!(successor.read_state(&state, &[1..2, 0..3]).await.unwrap(), [vec![2], vec![1, 2, 3]]);
    let entry = commit(&logged, std::slice::from_ref(&state));
    successor.log_commit(&entry).await.unwrap();
    successor.log_commit(&entry).await.unwrap();
    let finished = checkpoint.log_commit(&CommitEntry { epoch: 1, ..entry.clone() }).await.unwrap_err();
    assert!(matches!(finished, Error::AlreadyCommitted { epoch: 2, .. }));
    assert_eq!(finished.kind(), Kind::Transient);
    let recovered = successor.recover().await.unwrap();
    assert_eq!(
        (recovered.replay(), recovered.plan.as_ref(), &recovered.commit),
        (None, Some(&logged), &Some(entry.clone()))
    );
    let other_plan = CommitEntry { plan_digest: "sha256:00".into(), ..entry };
    assert_eq!(successor.log_commit(&other_plan).await.unwrap_err().kind(), Kind::Fatal);

    // Purge.
    let live = run_batches(&successor, 1, 9).await;
    let being_written = successor.put_state(9, Uuid::new_v4(), StateKind::Delta, vec![9], 0, None).await.unwrap();
    assert_eq!(checkpoint.purge(8, 3, &[], &[]).await.unwrap(), 0, "a process that has a successor deletes nothing");
    let size = successor.size_bytes().await.unwrap();
    // State 0 to 6 but for what commits 7 and 8 name, logs 0 to 5 twice, one former owner.
    assert_eq!(successor.purge(8, 3, &live, &[]).await.unwrap(), 6 + 2 * 6 + 1);
    assert!(successor.size_bytes().await.unwrap() < size);
    for file in live.iter().chain([&being_written]) {
        successor.open_state(file, 10).await.unwrap();
    }
    let left = files(&location).await;
    assert_eq!(left.iter().filter(|f| f.starts_with("offsets/")).count(), 3, "{left:?}");
    assert_eq!(successor.recover().await.unwrap().commit.unwrap().state, live);
    assert_eq!(successor.purge(8, 3, &live, &[]).await.unwrap(), 0);
    successor.check_owner().await.unwrap();
}

#[tokio::test]
async fn memory_conforms() {
    conformance(memory()).await;
}

#[tokio::test]
async fn local_files_conform() {
    let folder = tempfile::tempdir().unwrap();
    conformance(local(folder.path())).await;
    let below = Location { prefix: Path::from("deeper/still"), ..local(folder.path()) };
    conformance(below).await;
}

#[tokio::test]
async fn every_flipped_byte_of_every_json_file_is_named() {
    let location = memory();
    let mut checkpoint = Checkpoint::open(location.clone(), "p").await.unwrap();
    checkpoint.claim().await.unwrap();
    run_batches(&checkpoint, 0, 2).await;
    checkpoint.log_plan(&plan(2, 1)).await.unwrap();
    let mut former = checkpoint.clone();
    Checkpoint::open(location.clone(), "p").await.unwrap().claim().await.unwrap();
    former.epoch = 1;
    let raw = Files::new(location.clone());
    for file in [
        METADATA,
        "owners/00000000000000000002.json",
        "offsets/00000000000000000001.json",
        "offsets/00000000000000000002.json",
        "commits/00000000000000000001.json",
    ] {
        let good = raw.read(file).await.unwrap().unwrap();
        let mut damages: Vec<Vec<u8>> = vec![Vec::new(), [&good[..], b"\n"].concat(), [&good[..], &good[..]].concat()];
        for at in 0..good.len() {
            damages.push(good[..at].to_vec());
            for bit in [0, 5, 7] {
                let mut flipped = good.to_vec();
                flipped[at] ^= 1 << bit;
                damages.push(flipped);
            }
        }
        for damage in damages {
            overwrite(&location, file, &damage).await;
            let error = if file == METADATA {
                Checkpoint::open(location.clone(), "p").await.unwrap_err()
            } else if file.starts_with("owners") {
                former.check_owner().await.unwrap_err()
            } else {
                checkpoint.recover().await.unwrap_err()
            };
            assert_eq!(error.kind(), Kind::Fatal);
            let text = error.to_string();
            assert!(text.contains(file) && text.contains(&location.url) && text.contains("restore"), "{text}");
        }
        overwrite(&location, file, &good).await;
    }
    checkpoint.recover().await.unwrap();
}

#[tokio::test]
async fn a_file_under_the_number_of_another_is_damage() {
    let location = memory();
    let checkpoint = Checkpoint::open(location.clone(), "p").await.unwrap();
    run_batches(&checkpoint, 0, 2).await;
    let raw = Files::new(location.clone());
    for folder in ["offsets", "commits"] {
        let (older, newer) = (numbered_bytes(&raw, folder, 0).await, numbered_bytes(&raw, folder, 1).await);
        overwrite(&location, &files::numbered(folder, 1), &older).await;
        let error = checkpoint.recover().await.unwrap_err();
        assert!(matches!(&error, Error::Damaged { file, .. } if *file == files::numbered(folder, 1)), "{error}");
        overwrite(&location, &files::numbered(folder, 1), &newer).await;
    }
    checkpoint.recover().await.unwrap();
}

async fn numbered_bytes(raw: &Files, folder: &str, number: u64) -> Bytes {
    raw.read(&files::numbered(folder, number)).await.unwrap().unwrap()
}

#[tokio::test]
async fn a_commit_of_another_plan_is_damage() {
    let location = memory();
    let checkpoint = Checkpoint::open(location.clone(), "p").await.unwrap();
    run_batches(&checkpoint, 0, 3).await;
    let raw = Files::new(location.clone());
    let file = files::numbered("offsets", 2);
    overwrite(&location, &file, &raw.encode(&file, &plan(2, 77)).unwrap()).await;
    let error = checkpoint.recover().await.unwrap_err();
    assert!(error.to_string().contains("different copies"), "{error}");
    // Also when a later plan has been logged since; and not when the file is no longer there.
    checkpoint.log_plan(&plan(3, 1)).await.unwrap();
    assert_eq!(checkpoint.recover().await.unwrap_err().kind(), Kind::Fatal);
    remove(&location, &file).await;
    assert_eq!(checkpoint.recover().await.unwrap().replay().unwrap().plan.batch, 3);
}

#[tokio::test]
async fn missing_log_files_are_named() {
    for (missing, named) in [
        (vec!["commits/2"], None),
        (vec!["offsets/2"], Some("offsets/00000000000000000002.json")),
        (vec!["commits/1", "commits/2"], Some("commits/00000000000000000001.json")),
        (vec!["commits/0", "commits/1", "commits/2"], Some("commits/00000000000000000001.json")),
        (vec!["offsets/0", "offsets/1", "offsets/2"], Some("offsets/00000000000000000002.json")),
    ] {
        let location = memory();
        let checkpoint = Checkpoint::open(location.clone(), "p").await.unwrap();
        run_batches(&checkpoint, 0, 3).await;
        for file in &missing {
            let (folder, number) = file.split_once('/').unwrap();
            remove(&location, &files::numbered(folder, number.parse().unwrap())).await;
        }
        match (checkpoint.recover().await, named) {
            (Ok(recovered), None) => assert_eq!(recovered.replay().unwrap().plan.batch, 2),
            (Err(Error::Damaged { file, .. }), Some(named)) => assert_eq!(file, named, "{missing:?}"),
            (other, _) => panic!("{missing:?}: {other:?}"),
        }
    }
}

#[tokio::test]
async fn foreign_checkpoints_are_refused() {
    let location = memory();
    let checkpoint = Checkpoint::open(location.clone(), "p").await.unwrap();
    let error = Checkpoint::open(location.clone(), "q").await.unwrap_err();
    assert!(error.to_string().contains(r#"belongs to pipeline "p", not to "q""#), "{error}");
    assert_eq!(error.kind(), Kind::Fatal);

    let raw = Files::new(location.clone());
    let later = raw.encode(METADATA, &serde_json::json!({"format": 2, "query": "unknown"})).unwrap();
    overwrite(&location, METADATA, &later).await;
    let error = Checkpoint::open(location.clone(), "p").await.unwrap_err();
    assert!(error.to_string().contains("format version 2"), "{error}");
    assert!(Checkpoint::inspect(location.clone()).await.is_err());

    checkpoint.log_plan(&plan(0, 1)).await.unwrap();
    remove(&location, METADATA).await;
    let error = Checkpoint::open(location.clone(), "p").await.unwrap_err();
    assert!(matches!(error, Error::Damaged { ref file, .. } if file == METADATA), "{error}");
}

#[tokio::test]
async fn state_of_another_length_and_missing_state_are_named() {
    let folder = tempfile::tempdir().unwrap();
    for location in [memory(), local(folder.path())] {
        let checkpoint = Checkpoint::open(location.clone(), "p").await.unwrap();
        let state = checkpoint.put_state(5, Uuid::new_v4(), StateKind::Delta, b"abc".to_vec(), 0, None).await.unwrap();
        let named = |result: Result<(), Error>, says: &str| {
            let error = result.unwrap_err();
            let text = error.to_string();
            assert!(text.contains(says) && text.contains(&state.name) && text.contains("batch 5"), "{text}");
            assert_eq!(error.kind(), Kind::Fatal);
        };
        for (damage, says) in [(&b"ab"[..], "has 2 bytes instead of 3"), (b"abcd", "has 4 bytes"), (b"", "has 0 bytes")]
        {
            overwrite(&location, &state.name, damage).await;
            named(checkpoint.open_state(&state, 2).await.map(drop), says);
            if damage.len() < 3 {
                named(checkpoint.read_state(&state, &[0..1, 2..3]).await.map(drop), says);
            }
        }
        remove(&location, &state.name).await;
        named(checkpoint.open_state(&state, 2).await.map(drop), "is missing");
        named(checkpoint.read_state(&state, &[0..1, 2..3]).await.map(drop), "is missing");
    }
}

#[tokio::test]
async fn what_a_compaction_uses_stays() {
    let location = memory();
    let mut checkpoint = Checkpoint::open(location.clone(), "p").await.unwrap();
    checkpoint.claim().await.unwrap();
    let live = run_batches(&checkpoint, 0, 6).await;
    let attempt = Uuid::new_v4();
    let part = checkpoint.put_state(3, attempt, StateKind::Run(7), vec![1], 0, None).await.unwrap();
    assert!(part.is_run() && !live[0].is_run());
    checkpoint.purge(5, 2, &live, &[Checkpoint::state_names(3, attempt)]).await.unwrap();
    checkpoint.open_state(&part, 1).await.unwrap();
    checkpoint.purge(5, 2, &live, &[]).await.unwrap();
    assert!(checkpoint.open_state(&part, 1).await.is_err());
}

#[tokio::test]
async fn names_that_are_not_ours_are_left_alone() {
    let location = memory();
    let mut checkpoint = Checkpoint::open(location.clone(), "p").await.unwrap();
    checkpoint.claim().await.unwrap();
    let live = run_batches(&checkpoint, 0, 3).await;
    let foreign = [
        "offsets/99.json",
        "offsets/old/00000000000000000009.json",
        "commits/x.tmp",
        "state/.DS_Store",
        "state/00000000000000000000-x.bak",
    ];
    for file in foreign {
        overwrite(&location, file, b"x").await;
    }
    assert_eq!(checkpoint.recover().await.unwrap().plan.unwrap().plan.batch, 2);
    checkpoint.purge(2, 2, &live, &[]).await.unwrap();
    let left = files(&location).await;
    assert!(foreign.iter().all(|file| left.contains(&file.to_string())), "{left:?}");
}

#[tokio::test]
async fn a_checkpoint_deleted_under_a_running_query_ends_it() {
    let location = memory();
    let mut checkpoint = Checkpoint::open(location.clone(), "p").await.unwrap();
    checkpoint.claim().await.unwrap();
    for file in files(&location).await {
        remove(&location, &file).await;
    }
    let error = checkpoint.check_owner().await.unwrap_err();
    assert!(error.to_string().contains("deleted or replaced"), "{error}");
    assert_eq!(error.kind(), Kind::Fatal);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 4)]
async fn racing_processes_agree_on_one_query_one_owner_each_and_one_plan() {
    let folder = tempfile::tempdir().unwrap();
    for location in [memory(), local(folder.path())] {
        let racers = (0..8).map(|_| {
            let location = location.clone();
            tokio::spawn(async move {
                let mut checkpoint = Checkpoint::open(location, "p").await.unwrap();
                let epoch = checkpoint.claim().await.unwrap();
                let planned = checkpoint.log_plan(&plan(0, epoch)).await;
                (checkpoint, epoch, planned)
            })
        });
        let racers: Vec<_> = futures::future::join_all(racers).await.into_iter().map(Result::unwrap).collect();
        assert!(racers.iter().all(|(c, ..)| c.query_id() == racers[0].0.query_id()));
        assert_eq!(racers.iter().filter(|(c, ..)| c.is_new()).count(), 1);
        let mut epochs: Vec<_> = racers.iter().map(|(_, epoch, _)| *epoch).collect();
        epochs.sort();
        assert_eq!(epochs, (1..=8).collect::<Vec<_>>());
        assert_eq!(racers.iter().filter(|(.., planned)| planned.is_ok()).count(), 1);
        let mut owners = 0;
        for (checkpoint, epoch, planned) in &racers {
            assert!(matches!(planned, Ok(_) | Err(Error::Superseded { .. })));
            match checkpoint.check_owner().await {
                Ok(()) => owners += 1,
                Err(e) => assert!(matches!(e, Error::OtherOwner { epoch: 8, .. }) && *epoch < 8, "{e}"),
            }
        }
        assert_eq!(owners, 1);
    }
}

/// A store whose answers get lost: the put happens, its outcome is a time-out.
#[derive(Debug)]
struct Flaky {
    inner: InMemory,
    lose_answers: AtomicBool,
    refuse_puts: AtomicBool,
    refuse_gets: AtomicBool,
}

impl std::fmt::Display for Flaky {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("flaky")
    }
}

fn timed_out<T>() -> object_store::Result<T> {
    Err(object_store::Error::Generic { store: "flaky", source: "timed out".into() })
}

#[async_trait]
impl ObjectStore for Flaky {
    async fn put_opts(&self, path: &Path, payload: PutPayload, options: PutOptions) -> object_store::Result<PutResult> {
        assert_eq!(options.mode, PutMode::Create, "{path} is written once");
        if self.refuse_puts.load(Ordering::SeqCst) {
            return timed_out();
        }
        let result = self.inner.put_opts(path, payload, options).await;
        if self.lose_answers.load(Ordering::SeqCst) { timed_out() } else { result }
    }

    async fn put_multipart_opts(
        &self,
        path: &Path,
        options: PutMultipartOptions,
    ) -> object_store::Result<Box<dyn MultipartUpload>> {
        self.inner.put_multipart_opts(path, options).await
    }

    async fn get_opts(&self, path: &Path, options: GetOptions) -> object_store::Result<GetResult> {
        if self.refuse_gets.load(Ordering::SeqCst) { timed_out() } else { self.inner.get_opts(path, options).await }
    }

    fn delete_stream(
        &self,
        paths: BoxStream<'static, object_store::Result<Path>>,
    ) -> BoxStream<'static, object_store::Result<Path>> {
        self.inner.delete_stream(paths)
    }

    fn list(&self, prefix: Option<&Path>) -> BoxStream<'static, object_store::Result<ObjectMeta>> {
        self.inner.list(prefix)
    }

    async fn list_with_delimiter(&self, prefix: Option<&Path>) -> object_store::Result<ListResult> {
        self.inner.list_with_delimiter(prefix).await
    }

    async fn copy_opts(&self, from: &Path, to: &Path, options: CopyOptions) -> object_store::Result<()> {
        self.inner.copy_opts(from, to, options).await
    }
}

#[tokio::test]
async fn a_put_whose_answer_was_lost_is_looked_up() {
    let store = Arc::new(Flaky {
        inner: InMemory::new(),
        lose_answers: AtomicBool::new(true),
        refuse_puts: AtomicBool::new(false),
        refuse_gets: AtomicBool::new(false),
    });
    let location = Location { store: store.clone(), prefix: Path::from("ck"), url: "flaky:///ck".into() };
    // Everything works although no put is ever answered, and losing is still losing.
    conformance(location.clone()).await;

    let checkpoint = Checkpoint::open(location, "p").await.unwrap();
    store.refuse_puts.store(true, Ordering::SeqCst);
    let error = checkpoint.log_plan(&plan(9, 1)).await.unwrap_err();
    assert!(matches!(error, Error::Transient { .. }), "not there: it did not happen: {error}");
    store.refuse_gets.store(true, Ordering::SeqCst);
    let error = checkpoint.log_plan(&plan(9, 1)).await.unwrap_err();
    assert_eq!(error.kind(), Kind::Indeterminate);
    assert_eq!(checkpoint.recover().await.unwrap_err().kind(), Kind::Transient);
}

#[tokio::test]
async fn a_batch_that_is_held_back_is_let_through_by_name_of_its_plan_and_both_files_go_with_the_logs() {
    let location = memory();
    let mut checkpoint = Checkpoint::open(location.clone(), "p").await.unwrap();
    let epoch = checkpoint.claim().await.unwrap();
    let logged = checkpoint.log_plan(&plan(0, epoch)).await.unwrap();
    assert_eq!(checkpoint.held(&logged).await.unwrap(), None);
    assert!(!checkpoint.is_resumed(0, &logged.digest).await.unwrap());
    let held = |reason: &str| Held {
        batch: 0,
        plan_digest: logged.digest.clone(),
        reason: reason.to_string(),
        held_at: "now".to_string(),
    };
    checkpoint.hold(&held("first")).await.unwrap();
    checkpoint.hold(&held("second")).await.unwrap();
    assert_eq!(checkpoint.held(&logged).await.unwrap(), Some(held("first")));
    checkpoint.resume(&logged).await.unwrap();
    checkpoint.resume(&logged).await.unwrap();
    assert!(checkpoint.is_resumed(0, &logged.digest).await.unwrap());
    assert!(!checkpoint.is_resumed(0, "sha256:another").await.unwrap());
    assert!(!checkpoint.is_resumed(1, &logged.digest).await.unwrap());
    let other = LoggedPlan { digest: "sha256:another".to_string(), ..logged.clone() };
    assert!(checkpoint.resume(&other).await.unwrap_err().to_string().contains("another plan"));

    checkpoint.purge(1, 2, &[], &[]).await.unwrap();
    assert!(checkpoint.is_resumed(0, &logged.digest).await.unwrap());
    checkpoint.purge(2, 2, &[], &[]).await.unwrap();
    assert!(!checkpoint.is_resumed(0, &logged.digest).await.unwrap());
    assert_eq!(checkpoint.held(&logged).await.unwrap(), None);
}

#[tokio::test]
async fn what_the_first_execution_found_unknown_holds_for_all() {
    let mut checkpoint = Checkpoint::open(memory(), "telemetry").await.unwrap();
    checkpoint.claim().await.unwrap();
    let ids = std::collections::BTreeSet::from([2, 7]);
    assert_eq!(checkpoint.unknown_ids(3, "sha256:plan").await.unwrap(), None);
    assert!(checkpoint.log_unknown_ids(3, "sha256:plan", ids.clone()).await.unwrap());
    assert!(checkpoint.log_unknown_ids(3, "sha256:plan", ids.clone()).await.unwrap(), "a replay says the same");
    assert!(!checkpoint.log_unknown_ids(3, "sha256:plan", Default::default()).await.unwrap());
    assert_eq!(checkpoint.unknown_ids(3, "sha256:plan").await.unwrap(), Some(ids));
    assert!(checkpoint.unknown_ids(3, "sha256:another").await.unwrap_err().to_string().contains("another plan"));
}
