//! The state store with many open groups; `bench/state` says what it measures and how to run it.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic)]

use std::sync::Arc;
use std::time::{Duration, Instant};

use arrow::array::{ArrayRef, Float64Array, StringArray, TimestampMicrosecondArray};
use arrow::datatypes::{DataType, Field, Schema, SchemaRef, TimeUnit};
use arrow::record_batch::RecordBatch;
use floe::checkpoint::{Checkpoint, StateFile, StateKind};
use floe::config::{OutputMode, TableConfig, WindowConfig};
use floe::state::{Lane, Numbers, Reader, StateStore, WindowQuery};
use floe::window::Windowing;
use tokio::runtime::Runtime;
use uuid::Uuid;

#[global_allocator]
static ALLOCATOR: mimalloc::MiMalloc = mimalloc::MiMalloc;

const MINUTE_US: i64 = 60_000_000;
const LANES: u64 = 8;
const TOUCHED: u64 = 100_000;
const WORKERS: usize = 2;
const UNBOUNDED: u64 = u64::MAX / 8;

fn main() {
    let groups = std::env::args().skip(1).find(|a| !a.starts_with("--")).map(|a| a.replace('_', ""));
    let groups: u64 = groups.map_or(10_000_000, |a| a.parse().expect("the number of groups"));
    for windows in [1, 10, 30] {
        window_stage(windows);
    }
    println!(
        "{:<28} {:>10} {:>9} {:>9} {:>12} {:>10} {:>10} {:>9} {:>9}",
        "open groups",
        "windows",
        "batch ms",
        "worst ms",
        "compaction s",
        "files MB",
        "recovery s",
        "B/group",
        "RSS B/gr"
    );
    for windows in [100, 1] {
        for groups in [TOUCHED, groups] {
            Bench::new(windows, groups, UNBOUNDED).measure("in memory");
        }
        Bench::new(windows, groups, 64 << 20).measure("in files, budget 64 MiB");
    }
}

fn schema() -> SchemaRef {
    Arc::new(Schema::new(vec![
        Field::new("t", DataType::Timestamp(TimeUnit::Microsecond, Some("+00:00".into())), true),
        Field::new("device", DataType::Utf8, true),
        Field::new("x", DataType::Float64, true),
    ]))
}

fn queries() -> Arc<[WindowQuery]> {
    let aggregates = [("events", "count(*)"), ("mean", "avg(x)"), ("low", "min(x)"), ("high", "max(x)")];
    let config = WindowConfig {
        of: 0,
        table: TableConfig {
            table: "telemetry.device_minutes".to_string(),
            partition_by: Vec::new(),
            sort_by: Vec::new(),
            properties: Default::default(),
            provenance: false,
        },
        windowing: Windowing::new(Duration::from_secs(60), None, Duration::ZERO, None).unwrap(),
        output_mode: OutputMode::Append,
        filter: None,
        late_table: None,
        group_by: vec!["device".to_string()],
        aggregates: aggregates.iter().map(|(n, e)| (n.to_string(), e.to_string())).collect(),
    };
    vec![WindowQuery::compile(&config, &schema(), "t").unwrap()].into()
}

/// Rows of groups, each of a window and a device, dealt out to lanes by device.
fn rows(windows: u64, groups: impl Iterator<Item = u64>) -> Vec<RecordBatch> {
    let mut lanes: Vec<Vec<(i64, String)>> = vec![Vec::new(); LANES as usize];
    for group in groups {
        let (window, device) = (group % windows, group / windows);
        lanes[(device % LANES) as usize].push((window as i64 * MINUTE_US, format!("device-{device:08}")));
    }
    let batch = |rows: &Vec<(i64, String)>| {
        let columns: Vec<ArrayRef> = vec![
            Arc::new(TimestampMicrosecondArray::from_iter(rows.iter().map(|r| Some(r.0))).with_timezone("+00:00")),
            Arc::new(StringArray::from_iter_values(rows.iter().map(|r| &r.1))),
            Arc::new(Float64Array::from_iter_values((0..rows.len()).map(|i| i as f64))),
        ];
        RecordBatch::try_new(schema(), columns).unwrap()
    };
    lanes.iter().map(batch).collect()
}

fn mix(n: u64) -> u64 {
    let n = (n ^ (n >> 31)).wrapping_mul(0x9E37_79B9_7F4A_7C15);
    n ^ (n >> 29)
}

struct Bench {
    _folder: tempfile::TempDir,
    runtime: Runtime,
    checkpoint: Arc<Checkpoint>,
    reader: Reader,
    queries: Arc<[WindowQuery]>,
    windows: u64,
    groups: u64,
    budget: u64,
    batches: u64,
}

impl Bench {
    fn new(windows: u64, groups: u64, budget: u64) -> Bench {
        let folder = tempfile::tempdir_in(env!("CARGO_TARGET_TMPDIR")).unwrap();
        let runtime = Runtime::new().unwrap();
        let location = floe::storage::open(folder.path().to_str().unwrap()).unwrap();
        let checkpoint = Arc::new(runtime.block_on(Checkpoint::open(location, "bench")).unwrap());
        let reader = Reader::new(checkpoint.clone(), runtime.handle().clone(), Numbers::default());
        let queries = queries();
        Bench { _folder: folder, runtime, checkpoint, reader, queries, windows, groups, budget, batches: 0 }
    }

    fn recover(&self, files: &[StateFile]) -> StateStore {
        StateStore::recover(self.queries.clone(), self.reader.clone(), files, 0, self.budget, WORKERS).unwrap()
    }

    /// Aggregates a batch and makes it durable.
    fn batch(&mut self, store: &mut StateStore, rows: &[RecordBatch]) -> Duration {
        let begin = Instant::now();
        let queries = &self.queries;
        let lane = |rows: &RecordBatch| {
            let mut lane = Lane::new(queries.clone(), [0].into(), 0, 0);
            lane.update(rows).unwrap();
            lane
        };
        let lanes: Vec<Lane> = std::thread::scope(|scope| {
            let work = |part: &[RecordBatch]| part.iter().map(lane).collect::<Vec<Lane>>();
            let workers: Vec<_> =
                rows.chunks(rows.len().div_ceil(WORKERS)).map(|part| scope.spawn(move || work(part))).collect();
            workers.into_iter().flat_map(|w| w.join().unwrap()).collect()
        });
        let mut delta = store.merge_lanes(lanes, 0, WORKERS).unwrap();
        assert!(store.close(0).is_empty());
        let bytes = std::mem::take(&mut delta.bytes);
        let (crc32, end) = (delta.crc32(), delta.max_window_end_us);
        let put = self.checkpoint.put_state(self.batches, Uuid::new_v4(), StateKind::Delta, bytes, crc32, end);
        store.add(self.runtime.block_on(put).unwrap(), &delta);
        store.shrink().unwrap();
        self.batches += 1;
        begin.elapsed()
    }

    fn touched(&self, round: u64) -> Vec<RecordBatch> {
        let step = self.groups / TOUCHED;
        let pick = |n: u64| if step > 1 { n * step + mix(n + round) % step } else { n };
        // In an order of their own, as records come.
        let mut order: Vec<u64> = (0..TOUCHED).collect();
        order.sort_by_key(|n| mix(mix(*n) + round));
        rows(self.windows, order.into_iter().map(pick))
    }

    fn measure(mut self, what: &str) {
        let mut store = self.recover(&[]);
        let share = 500_000.min(self.groups);
        for first in (0..self.groups).step_by(share as usize) {
            let rows = rows(self.windows, first..(first + share).min(self.groups));
            self.batch(&mut store, &rows);
        }
        // As after a while: one run, some deltas, and a compaction that goes on beside the batches.
        for round in 0..64 - store.deltas().min(63) as u64 {
            let rows = self.touched(round);
            self.batch(&mut store, &rows);
        }
        let compaction = store.compaction(self.batches, 0).expect("due");
        let begin = Instant::now();
        store.adopt(compaction.run().unwrap().unwrap());
        let compacted = begin.elapsed();
        let mut times: Vec<Duration> = Vec::new();
        for round in 100..115 {
            let rows = self.touched(round);
            times.push(self.batch(&mut store, &rows));
        }
        times.sort();
        let files = store.files();
        drop(store);
        let before = resident_bytes();
        let begin = Instant::now();
        let store = self.recover(&files);
        let recovery = begin.elapsed();
        let resident = resident_bytes().saturating_sub(before);
        let stats = &store.stats().queries[0];
        assert_eq!(stats.open_windows, self.windows);
        let held = if stats.stored_windows == 0 { self.groups } else { stats.groups.min(self.groups) };
        println!(
            "{:<28} {:>10} {:>9.1} {:>9.1} {:>12.2} {:>10} {:>10.2} {:>9} {:>9}",
            format!("{} {what}", self.groups),
            self.windows,
            times[times.len() / 2].as_secs_f64() * 1e3,
            times[times.len() - 1].as_secs_f64() * 1e3,
            compacted.as_secs_f64(),
            files.iter().map(|f| f.bytes).sum::<u64>() / 1_000_000,
            recovery.as_secs_f64(),
            stats.bytes / held.max(1),
            resident / held.max(1),
        );
    }
}

/// 4 million rows of 100,000 devices in batches of a million, spread over so many windows: partial aggregation, merging and
/// encoding, on one thread. Lanes get chunks of 5,000 rows, as partitions do.
fn window_stage(windows: u64) {
    const ROWS: u64 = 4_000_000;
    const DEVICES: u64 = 100_000;
    const CHUNK: u64 = 5_000 * LANES;
    let queries = queries();
    let chunks: Vec<Vec<RecordBatch>> = (0..ROWS / CHUNK)
        .map(|chunk| {
            let group = |n: u64| mix(n) % DEVICES * windows + n * windows / ROWS;
            rows(windows, (chunk * CHUNK..(chunk + 1) * CHUNK).map(group))
        })
        .collect();
    let mut store = StateStore::new(queries.clone());
    let begin = Instant::now();
    let mut groups = 0;
    for batch in chunks.chunks(25) {
        let mut lanes: Vec<Lane> = (0..LANES).map(|_| Lane::new(queries.clone(), [0].into(), 0, 0)).collect();
        for chunk in batch {
            lanes.iter_mut().zip(chunk).for_each(|(lane, rows)| lane.update(rows).unwrap());
        }
        groups += store.merge_lanes(lanes, 0, 1).unwrap().groups;
    }
    let took = begin.elapsed().as_nanos() as f64 / ROWS as f64;
    println!(
        "window stage: {took:.0} ns a row; 100,000 devices, {windows} windows, {:.1} rows to a group of a batch",
        ROWS as f64 / groups as f64
    );
}

fn resident_bytes() -> u64 {
    let statm = std::fs::read_to_string("/proc/self/statm").unwrap();
    statm.split(' ').nth(1).unwrap().parse::<u64>().unwrap() * 4096
}
