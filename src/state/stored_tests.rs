//! Windows in memory, in files, read back, compacted, recovered: the same bits.

use std::sync::Arc;

use arrow::record_batch::RecordBatch;
use object_store::ObjectStoreExt;
use object_store::memory::InMemory;
use object_store::path::Path;
use proptest::prelude::*;
use tokio::runtime::Runtime;
use uuid::Uuid;

use super::tests::{ALL, MINUTE, batch, canonical, close, close_all, config, lane, queries, stream};
use super::tests_sessions::sessions;
use super::*;
use crate::checkpoint::{Checkpoint, StateKind, WindowStates};
use crate::config::{OutputMode, WindowConfig};
use crate::storage::Location;

/// A query's durable side: files, what the newest commit names, the watermark.
pub(super) struct Disk {
    runtime: Runtime,
    location: Location,
    reader: Reader,
    queries: Arc<[WindowQuery]>,
    batch: u64,
    evict_ms: i64,
    pub(super) committed: Vec<StateFile>,
}

impl Disk {
    pub(super) fn new(queries: Arc<[WindowQuery]>) -> Disk {
        let runtime = Runtime::new().unwrap();
        let location =
            Location { store: Arc::new(InMemory::new()), prefix: Path::from("ck"), url: "memory:///ck".into() };
        let checkpoint = Arc::new(runtime.block_on(Checkpoint::open(location.clone(), "p")).unwrap());
        let reader = Reader::new(checkpoint, runtime.handle().clone(), Numbers::default());
        Disk { runtime, location, reader, queries, batch: 0, evict_ms: 0, committed: Vec::new() }
    }

    pub(super) fn recover(&self, budget: u64) -> Result<StateStore, Error> {
        let (queries, reader) = (self.queries.clone(), self.reader.clone());
        let mut store = StateStore::recover(queries, reader, &self.committed, self.evict_ms, budget, 2)?;
        // Small enough for windows to be read in shards.
        store.residence.as_mut().unwrap().share = 20_000;
        Ok(store)
    }

    /// A batch as [`crate::query`] does it; gives what it emits.
    pub(super) fn run(&mut self, store: &mut StateStore, lanes: Vec<Lane>, evict_ms: i64) -> Vec<RecordBatch> {
        let delta = store.merge_lanes(lanes, evict_ms, 2).unwrap();
        let emitted = close(store, evict_ms).into_iter().flat_map(|w| w.evaluate().unwrap().0).collect();
        store.drop_superfluous(evict_ms);
        if delta.groups > 0 {
            let put = self.reader.checkpoint().put_state(
                self.batch,
                Uuid::new_v4(),
                StateKind::Delta,
                delta.bytes.clone(),
                delta.crc32(),
                delta.max_window_end_us,
            );
            store.add(self.runtime.block_on(put).unwrap(), &delta);
        }
        self.committed = store.files();
        (self.batch, self.evict_ms) = (self.batch + 1, evict_ms);
        store.shrink().unwrap();
        emitted
    }

    pub(super) fn compact(&self, store: &StateStore) -> Option<Compacted> {
        store.compaction_of_all(self.batch, self.evict_ms)?.run().unwrap()
    }

    fn overwrite(&self, file: &StateFile, bytes: Vec<u8>) {
        self.runtime.block_on(self.location.store.put(&self.path(file), bytes.into())).unwrap();
    }

    fn bytes(&self, file: &StateFile) -> Vec<u8> {
        let get = async { self.location.store.get(&self.path(file)).await.unwrap().bytes().await.unwrap() };
        self.runtime.block_on(get).to_vec()
    }

    fn path(&self, file: &StateFile) -> Path {
        file.name.split('/').fold(self.location.prefix.clone(), |path, part| path.join(part))
    }
}

fn all_kinds_of_queries() -> Arc<[WindowQuery]> {
    let mut update = config(2 * MINUTE as u64, &["device"], &ALL);
    update.output_mode = OutputMode::Update;
    queries(&[
        update,
        sessions(MINUTE / 2, &["device"], &ALL),
        sessions(MINUTE / 20, &["device", "b"], &ALL[2..]),
        config(MINUTE as u64, &["device"], &ALL),
        config(4 * MINUTE as u64, &["b", "device"], &ALL[2..]),
        config(12 * MINUTE as u64, &[], &ALL[1..]),
    ])
}

const END: i64 = i64::MAX / 1000 + 1;

/// Batches with disorder; the watermark moves on with every second one.
fn batches(queries: &Arc<[WindowQuery]>, seed: u64, count: u64) -> Vec<(Vec<Lane>, i64)> {
    let evict = |n: u64| (n / 2) as i64 * 60_000;
    let lanes =
        |n: u64| (0..3).map(|p| lane(queries, &[stream(seed + 10 * n + p, 60)], evict(n.saturating_sub(1)))).collect();
    (0..count).map(|n| (lanes(n), evict(n))).chain([(Vec::new(), END)]).collect()
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 10, max_shrink_iters: 10, failure_persistence: None, ..ProptestConfig::default() })]
    #[test]
    fn results_do_not_depend_on_what_was_in_memory(
        seed in 0u64..1_000,
        budgets in proptest::collection::vec(prop_oneof![Just(0u64), 1_000u64..400_000, Just(u64::MAX / 8)], 9),
        restarts in proptest::collection::vec(any::<bool>(), 9),
        // 0: no; 1: taken over at once; 2: taken over one batch later.
        compactions in proptest::collection::vec(0u8..3, 9),
    ) {
        let queries = all_kinds_of_queries();
        let mut memory = StateStore::new(queries.clone());
        let mut disk = Disk::new(queries.clone());
        let mut store = disk.recover(budgets[0]).unwrap();
        let mut waiting: Option<Compacted> = None;
        for (n, ((in_memory, evict_ms), (lanes, _))) in
            batches(&queries, seed, 8).into_iter().zip(batches(&queries, seed, 8)).enumerate()
        {
            memory.merge_lanes(in_memory, evict_ms, 1).unwrap();
            let expected: Vec<_> = close(&mut memory, evict_ms).into_iter().flat_map(|w| w.evaluate().unwrap().0).collect();
            let found = disk.run(&mut store, lanes, evict_ms);
            prop_assert!(canonical(&expected) == canonical(&found), "batch {}", n);
            if let Some(compacted) = waiting.take() {
                store.adopt(compacted);
            }
            match compactions[n] {
                1 => store.adopt(disk.compact(&store).unwrap()),
                2 => waiting = disk.compact(&store),
                _ => {}
            }
            if restarts[n] {
                store = disk.recover(budgets[n]).unwrap();
                waiting = None;
            } else {
                store.residence.as_mut().unwrap().budget_bytes = budgets[n];
                store.shrink().unwrap();
            }
        }
        prop_assert_eq!(store.stats().queries.iter().map(|q| q.open_windows).sum::<u64>(), 0);
        // What was compacted meanwhile is superfluous too.
        store.drop_superfluous(END);
        prop_assert_eq!(store.stats().files, 0);
    }
}

#[test]
fn a_large_window_comes_back_in_shards() {
    let queries = queries(&[config(4 * MINUTE as u64, &["device"], &ALL), config(12 * MINUTE as u64, &[], &ALL)]);
    let mut disk = Disk::new(queries.clone());
    let mut unbroken = disk.recover(u64::MAX / 8).unwrap();
    for (lanes, _) in batches(&queries, 5, 9).into_iter().take(9) {
        disk.run(&mut unbroken, lanes, 0);
    }
    let mut store = disk.recover(0).unwrap();
    // Small enough for the window without keys as well: its group is in the first shard.
    store.residence.as_mut().unwrap().share = 2_000;
    store.read_back(store.open.keys().copied().collect(), 3).unwrap();
    for window in store.open.values() {
        let Groups::Resident(Table::Window(table)) = &window.groups else { panic!("it was read back") };
        assert!(table.bits() > 0);
    }
    let rows = |store: &mut StateStore| {
        let lanes = batches(&queries, 500, 1).remove(0).0;
        store.merge_lanes(lanes, 0, 3).unwrap();
        canonical(&close_all(store).0)
    };
    assert!(rows(&mut store) == rows(&mut unbroken));
}

#[test]
fn the_budget_holds_and_the_windows_touched_last_stay() {
    let queries = queries(&[config(MINUTE as u64, &["device"], &ALL)]);
    let mut disk = Disk::new(queries.clone());
    let mut store = disk.recover(u64::MAX / 8).unwrap();
    let rows =
        |minute: i64| (0..40).map(move |i| (Some(minute * MINUTE + i), None, Some(1.0), Some(i))).collect::<Vec<_>>();
    for minute in [5, 1, 3] {
        disk.run(&mut store, vec![lane(&queries, &[batch(&rows(minute))], 0)], 0);
    }
    let resident = |store: &StateStore| -> Vec<i64> {
        let resident = store.open.iter().filter(|(_, w)| matches!(w.groups, Groups::Resident(_)));
        resident.map(|(unit, _)| unit.key / MINUTE).collect()
    };
    assert_eq!(resident(&store), [1, 3, 5]);
    let bytes = store.stats().queries[0].bytes;
    for (budget, stay) in [(bytes, vec![1, 3, 5]), (bytes - 1, vec![1, 3]), (bytes / 3, vec![3]), (0, vec![])] {
        store.residence.as_mut().unwrap().budget_bytes = budget;
        store.shrink().unwrap();
        assert_eq!(resident(&store), stay);
        let stats = &store.stats().queries[0];
        assert!(stats.bytes <= budget);
        assert_eq!((stats.open_windows, stats.stored_windows), (3, 3 - stay.len() as u64));
    }
    assert_eq!(store.stats().queries[0].groups, 3);
    // Recovery prefers the same ones.
    assert_eq!(resident(&disk.recover(u64::MAX / 8).unwrap()), [1, 3, 5]);
    let one = disk.committed[0].bytes * 3;
    let some = disk.recover(one).unwrap();
    assert!(resident(&some).contains(&3) && some.stats().queries[0].bytes <= one, "{:?}", resident(&some));
    assert!(resident(&disk.recover(0).unwrap()).is_empty());
}

#[test]
fn a_run_replaces_deltas_and_stays_while_nothing_touches_its_windows() {
    let queries = queries(&[config(MINUTE as u64, &["device"], &ALL)]);
    let mut disk = Disk::new(queries.clone());
    let mut store = disk.recover(0).unwrap();
    let rows = |minute: i64| [(Some(minute * MINUTE), Some("a"), Some(1.0), Some(1))];
    let touch = |disk: &mut Disk, store: &mut StateStore, minute: i64| {
        disk.run(store, vec![lane(&disk.queries.clone(), &[batch(&rows(minute))], 0)], 0);
    };
    for minute in [1, 2, 1, 2] {
        touch(&mut disk, &mut store, minute);
    }
    store.residence.as_mut().unwrap().share = 1;
    assert_eq!(store.stats().queries[0].groups, 4, "two groups, in two files each");
    store.adopt(disk.compact(&store).unwrap());
    assert_eq!(store.stats().queries[0].groups, 2);
    let runs: Vec<String> = store.files().into_iter().map(|f| f.name).collect();
    assert_eq!((runs.len(), store.deltas()), (2, 0), "a share each");
    touch(&mut disk, &mut store, 2);
    let compaction = store.compaction_of_all(9, 0).unwrap();
    assert_eq!(compaction.files(), 2, "the run that nothing has touched is left alone");
    assert!(!compaction.in_use().contains(&runs[0]));
    store.adopt(compaction.run().unwrap().unwrap());
    let files = store.files();
    assert!(files.len() == 2 && files.iter().any(|f| f.name == runs[0]) && files.iter().all(StateFile::is_run));
    // What has closed is not taken along.
    touch(&mut disk, &mut store, 1);
    touch(&mut disk, &mut store, 2);
    let compacted = store.compaction_of_all(9, 2 * 60_000).unwrap().run().unwrap().unwrap();
    assert_eq!(compacted.files(), (3, 1));
    let cancelled = store.compaction_of_all(9, 0).unwrap();
    cancelled.cancelled().store(true, std::sync::atomic::Ordering::Relaxed);
    assert!(cancelled.run().unwrap().is_none());
}

#[test]
fn when_a_compaction_is_due() {
    let queries = queries(&[config(MINUTE as u64, &["device"], &ALL)]);
    let mut disk = Disk::new(queries.clone());
    let mut store = disk.recover(0).unwrap();
    for n in 0..16 {
        assert!(store.compaction(n, 0).is_none(), "after {n}");
        disk.run(&mut store, vec![lane(&queries, &[stream(n, 100)], 0)], 0);
    }
    let compaction = store.compaction(16, 0).unwrap();
    store.adopt(compaction.run().unwrap().unwrap());
    assert!(store.compaction(16, 0).is_none());
}

/// Bits flipped, bytes missing, files gone or exchanged: named, at the latest when they are read.
#[test]
fn damage_is_named() {
    let queries = queries(&[config(MINUTE as u64, &["device"], &ALL[..4])]);
    let mut disk = Disk::new(queries.clone());
    let mut store = disk.recover(u64::MAX / 8).unwrap();
    for n in 0..2 {
        disk.run(&mut store, vec![lane(&queries, &[stream(n, 9)], 0)], 0);
    }
    let [file, other] = <[StateFile; 2]>::try_from(disk.committed.clone()).unwrap();
    let good = disk.bytes(&file);
    let named = |disk: &Disk, what: &str| {
        let Err(error) = disk.recover(u64::MAX / 8) else { panic!("{what}: nothing was noticed") };
        assert!(error.to_string().contains(&file.name), "{what}: {error}");
        assert_eq!(error.kind(), Kind::Fatal, "{what}: {error}");
        // In files only: found when it is needed.
        if let Ok(mut store) = disk.recover(0) {
            let done: Result<(), Error> = store.close(END).into_iter().try_for_each(|c| c.windows(|_| Ok(())));
            assert!(done.unwrap_err().to_string().contains(&file.name), "{what}");
            let Err(error) = store.compaction_of_all(9, 0).unwrap().run() else { panic!("{what}: compacted") };
            assert!(error.to_string().contains(&file.name), "{what}: {error}");
        }
    };
    for i in (64..good.len()).step_by(5) {
        let mut bad = good.clone();
        bad[i] ^= 0x10;
        disk.overwrite(&file, bad);
        named(&disk, &format!("byte {i}"));
    }
    for i in (0..good.len()).step_by(37) {
        disk.overwrite(&file, good[..i].to_vec());
        named(&disk, &format!("cut at {i}"));
    }
    disk.runtime.block_on(disk.location.store.delete(&disk.path(&file))).unwrap();
    named(&disk, "gone");
    if other.bytes == file.bytes {
        disk.overwrite(&file, disk.bytes(&other));
        named(&disk, "exchanged");
    }
    disk.overwrite(&file, good);
    disk.recover(0).unwrap();
}

/// State goes by number and not by place: in another order it is the same, and what was taken out does not come back.
#[test]
fn state_follows_its_number() {
    let of = |table: &str, minutes: u64| {
        let mut config = config(minutes * MINUTE as u64, &["device"], &ALL[..4]);
        config.table.table = format!("t.{table}");
        config
    };
    let (a, b) = (of("a", 1), of("b", 5));
    let mut disk = Disk::new(queries(&[a.clone(), b.clone()]));
    let mut states = WindowStates::default();
    let mut number = |disk: &mut Disk, configs: &[WindowConfig]| {
        disk.queries = queries(configs);
        states = states.with(disk.queries.iter().map(|q| (q.table(), q.state_definition())));
        let numbers = Numbers::of(&states, disk.queries.iter().map(WindowQuery::table));
        disk.reader = Reader::new(disk.reader.shared(), disk.runtime.handle().clone(), numbers);
    };
    let open = |disk: &Disk| {
        let store = disk.recover(u64::MAX / 8).unwrap();
        disk.queries.iter().map(|q| q.table().to_string()).zip(store.stats().queries).collect::<Vec<_>>()
    };
    number(&mut disk, &[a.clone(), b.clone()]);
    let mut store = disk.recover(u64::MAX / 8).unwrap();
    for n in 0..3 {
        let lane = lane(&disk.queries.clone(), &[stream(n, 50)], 0);
        disk.run(&mut store, vec![lane], 0);
    }
    let before = open(&disk);
    assert!(before.iter().all(|(_, stats)| stats.open_windows > 0));

    number(&mut disk, &[b.clone(), a.clone()]);
    let mut reordered = open(&disk);
    reordered.reverse();
    assert_eq!(reordered, before);
    let mut store = disk.recover(0).unwrap();
    let lane_of_b_a = lane(&disk.queries.clone(), &[stream(9, 50)], 0);
    disk.run(&mut store, vec![lane_of_b_a], 0);
    let compacted = disk.compact(&store).unwrap();
    store.adopt(compacted);
    disk.committed = store.files();
    let both = open(&disk);

    number(&mut disk, std::slice::from_ref(&a));
    assert_eq!(open(&disk), both[1..]);
    number(&mut disk, &[a.clone(), b.clone()]);
    let again = open(&disk);
    assert_eq!((&again[0], again[1].1.open_windows), (&both[1], 0), "what was taken out stays out");
    number(&mut disk, &[of("a", 2)]);
    assert_eq!(open(&disk)[0].1.open_windows, 0, "other windows are not the same state");
}

/// Files tell what is in them by these hashes: another release must find the same.
#[test]
fn the_shard_of_a_key_never_changes() {
    let query = &queries(&[config(MINUTE as u64, &["device", "x", "n", "b", "t"], &ALL)])[0];
    let rows = batch(&[
        (Some(1_700_000_000_000_000), Some("device-7"), Some(1.5), Some(-3)),
        (Some(-1), Some(""), Some(f64::NAN), Some(0)),
        (None, None, None, None),
    ]);
    assert_eq!(shard::hashes(query, &query.key_columns(&rows).unwrap().0).unwrap(), [44_418, 4_148, 13_173]);
}
