//! Sessions against a naive model, and by hand.

use std::collections::BTreeMap;
use std::time::Duration;

use arrow::array::AsArray;
use arrow::datatypes::{Int64Type, TimestampMicrosecondType};
use arrow::record_batch::RecordBatch;
use proptest::prelude::*;

use super::tests::{Row, batch, canonical, close, config, lane, queries, stream};
use super::*;
use crate::config::WindowConfig;
use crate::window::Windowing;

const SECOND: i64 = 1_000_000;
const END: i64 = i64::MAX / 1000 + 1;

pub(super) fn sessions(gap_us: i64, group_by: &[&str], aggregates: &[(&str, &str)]) -> WindowConfig {
    let mut config = config(1, group_by, aggregates);
    config.windowing = Windowing::session(Duration::from_micros(gap_us as u64)).unwrap();
    config
}

/// Key, start, end, rows, sum of `n`.
type Shown = (Option<String>, i64, i64, i64, i64);

fn show(batches: &[RecordBatch]) -> Vec<Shown> {
    let mut shown = Vec::new();
    for batch in batches {
        let time = |column: usize, row| batch.column(column).as_primitive::<TimestampMicrosecondType>().value(row);
        let number = |column: usize, row| batch.column(column).as_primitive::<Int64Type>().value(row);
        let keys = batch.column(2).as_string::<i32>();
        shown.extend(
            keys.iter().enumerate().map(|(row, key)| {
                (key.map(str::to_string), time(0, row), time(1, row), number(3, row), number(4, row))
            }),
        );
    }
    shown.sort();
    shown
}

fn by_device(gap_us: i64) -> Arc<[WindowQuery]> {
    queries(&[sessions(gap_us, &["device"], &[("events", "count(*)"), ("sum_n", "sum(n)")])])
}

/// The definition: whoever is in time joins whom it overlaps or touches; what ends by the watermark is out.
#[derive(Default)]
struct Model {
    open: Vec<Shown>,
}

impl Model {
    fn run(&mut self, rows: &[Row], gap_us: i64, late_ms: i64, evict_ms: i64) -> (Vec<Shown>, u64) {
        let mut late = 0;
        for (time, key, _, n) in rows {
            let (Some(time), Some(n)) = (time, n) else { continue };
            match closed(time + gap_us, late_ms) {
                true => late += 1,
                false => self.open.push((key.map(str::to_string), *time, time + gap_us, 1, *n)),
            }
        }
        self.open.sort();
        let mut merged: Vec<Shown> = Vec::new();
        for session in self.open.drain(..) {
            match merged.last_mut().filter(|last| last.0 == session.0 && session.1 <= last.2) {
                Some(last) => {
                    *last = (session.0, last.1, last.2.max(session.2), last.3 + session.3, last.4 + session.4);
                }
                None => merged.push(session),
            }
        }
        let (out, open) = merged.into_iter().partition(|s| closed(s.2, evict_ms));
        self.open = open;
        (out, late)
    }
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 60, failure_persistence: None, ..ProptestConfig::default() })]
    #[test]
    fn are_what_the_definition_says(
        rows in proptest::collection::vec((0..400i64, 0..4usize, -5..50i64), 1..150),
        cuts in proptest::collection::vec(1..30usize, 1..12),
        gap in 1..25i64,
        delay in 0..60i64,
        partitions in 1..4usize,
        drift in 0..3i64,
    ) {
        let gap_us = gap * SECOND;
        let queries = by_device(gap_us);
        let (mut store, mut model) = (StateStore::new(queries.clone()), Model::default());
        let (mut late_ms, mut evict_ms, mut max) = (0, 0, 0);
        let keys = [Some("a"), Some("b"), None, Some("")];
        let rows: Vec<Row> = rows.iter().enumerate().map(|(i, (time, key, n))| {
            (Some((time + drift * i as i64) * SECOND), keys[*key], None, Some(*n))
        }).collect();
        let mut rest = rows.as_slice();
        for cut in cuts.iter().cycle() {
            let (rows, after) = rest.split_at((*cut).min(rest.len()));
            rest = after;
            let lanes: Vec<Lane> = (0..partitions).map(|p| {
                let rows: Vec<Row> = rows.iter().skip(p).step_by(partitions).copied().collect();
                // Chunks of three rows.
                let chunks: Vec<RecordBatch> = rows.chunks(3).map(batch).collect();
                lane(&queries, &chunks, late_ms)
            }).collect();
            let late: u64 = lanes.iter().map(|lane| lane.late_rows()[0]).sum();
            let delta = store.merge_lanes(lanes, evict_ms, 2).unwrap();
            let found: Vec<RecordBatch> =
                close(&mut store, evict_ms).into_iter().flat_map(|w| w.evaluate().unwrap().0).collect();
            let (expected, expected_late) = model.run(rows, gap_us, late_ms, evict_ms);
            prop_assert_eq!(show(&found), expected);
            prop_assert_eq!(late, expected_late);
            prop_assert_eq!(store.stats().queries[0].open_windows, model.open.len() as u64);
            prop_assert!(delta.groups <= rows.len() as u64);
            if rest.is_empty() && evict_ms == END {
                break;
            }
            max = rows.iter().filter_map(|r| r.0).fold(max, i64::max);
            late_ms = evict_ms;
            evict_ms = if rest.is_empty() { END } else { evict_ms.max(max / 1000 - delay * 1000) };
        }
        prop_assert_eq!(store.stats().queries[0].groups, 0);
    }
}

fn run(store: &mut StateStore, rows: &[(i64, &'static str)], late_ms: i64, evict_ms: i64) -> (Vec<Shown>, u64) {
    let rows: Vec<Row> = rows.iter().map(|(t, key)| (Some(*t), Some(*key), None, Some(1))).collect();
    let lane = lane(&store.queries.clone(), &[batch(&rows)], late_ms);
    let late = lane.late_rows()[0];
    store.merge_lanes(vec![lane], evict_ms, 1).unwrap();
    let closed: Vec<RecordBatch> = close(store, evict_ms).into_iter().flat_map(|w| w.evaluate().unwrap().0).collect();
    (show(&closed), late)
}

#[test]
fn what_touches_is_one_and_what_closes_ends_at_the_watermark() {
    let gap = 10 * SECOND;
    let at = |seconds: i64| seconds * SECOND;
    let one = |key: &str, start: i64, end: i64, rows: i64| (Some(key.to_string()), start, end, rows, rows);
    let mut store = StateStore::new(by_device(gap));
    // b's second event comes where its session ends, c's a microsecond later; a third joins those of d.
    let rows = [
        (at(0), "b"),
        (at(10), "b"),
        (at(0), "c"),
        (at(10) + 1, "c"),
        (at(20), "d"),
        (at(0), "d"),
        (at(10), "d"),
        (at(50), "e"),
    ];
    assert_eq!(run(&mut store, &rows, 0, 0), (vec![], 0));
    assert_eq!(store.stats().queries[0].open_windows, 5);
    // At 10 s the first of c ends; that of b goes on until 20 s.
    assert_eq!(run(&mut store, &[], 0, 10_000), (vec![one("c", 0, at(10), 1)], 0));
    // By the watermark of the batch before, what alone would end at 10 s is late, even where it would join a session that is open.
    let (out, late) = run(&mut store, &[(at(0), "b"), (at(0) + 1, "b"), (at(5), "c")], 10_000, 15_000);
    assert_eq!((out, late), (vec![], 1));
    // c at 5 s has joined the one that began at 10 s, not the one that is out.
    let (out, _) = run(&mut store, &[], 15_000, 20_001);
    assert_eq!(out, [one("b", 0, at(20), 3), one("c", at(5), at(20) + 1, 2)]);
    assert_eq!(run(&mut store, &[], 20_001, END).0, [one("d", 0, at(30), 3), one("e", at(50), at(60), 1)]);
    assert_eq!(store.stats().queries[0].open_windows, 0);
}

/// Sums of doubles depend on the order of additions: chunks have no say in it.
#[test]
fn chunks_have_no_say() {
    let all = [("events", "count(*)"), ("x", "sum(x)"), ("mean", "avg(x)"), ("low", "min(x)"), ("n", "sum(n)")];
    let queries = queries(&[sessions(SECOND, &["device"], &all), sessions(3 * SECOND, &["device", "b"], &all)]);
    let rows = stream(7, 4_000);
    let run = |size: usize| {
        let chunks: Vec<RecordBatch> =
            (0..4_000).step_by(size).map(|at| rows.slice(at, size.min(4_000 - at))).collect();
        let mut store = StateStore::new(queries.clone());
        store.merge_lanes(vec![lane(&queries, &chunks, 0)], 0, 2).unwrap();
        store.merge_lanes(vec![lane(&queries, &[stream(8, 100)], 0)], END, 2).unwrap();
        let closed = close(&mut store, END);
        canonical(&closed.into_iter().flat_map(|w| w.evaluate().unwrap().0).collect::<Vec<_>>())
    };
    let whole = run(4_000);
    assert!(whole.len() > 1_000);
    for size in [1, 17, 1_000] {
        assert!(run(size) == whole, "chunks of {size}");
    }
}

/// Also where one of two rows of the same time was in a session of its own before both were in one.
#[test]
fn rows_of_the_same_time_stay_in_order_when_sessions_become_one() {
    let aggregates = [("first", "first_value(n) filter (where n > 1)"), ("last", "last_value(n) filter (where n > 1)")];
    let queries = queries(&[sessions(10 * SECOND, &["device"], &aggregates)]);
    let part = |rows: &[(i64, i64)]| {
        let rows: Vec<Row> = rows.iter().map(|(at, n)| (Some(at * SECOND), Some("a"), None, Some(*n))).collect();
        lane(&queries, &[batch(&rows)], 0)
    };
    let bridged = [(20, 2), (0, 1), (10, 1), (20, 3)];
    let bridged_later = [(0, 1), (20, 2), (10, 1), (20, 3)];
    let chain = [(0, 1), (40, 2), (20, 1), (30, 1), (10, 1), (40, 5), (40, 3)];
    for rows in [&bridged[..], &bridged_later, &chain] {
        // All at once, and cut between two batches at each place.
        for cut in 0..rows.len() {
            let mut store = StateStore::new(queries.clone());
            store.merge_lanes(vec![part(&rows[..cut])], 0, 1).unwrap();
            store.merge_lanes(vec![part(&rows[cut..])], 0, 1).unwrap();
            store.merge_lanes(Vec::new(), END, 1).unwrap();
            let out = close(&mut store, END).remove(0).evaluate().unwrap().0.remove(0);
            let value = |column: usize| out.column(column).as_primitive::<Int64Type>().value(0);
            assert_eq!((out.num_rows(), value(3), value(4)), (1, 2, 3), "{rows:?} cut at {cut}");
        }
    }
}

/// A batch costs what it touches: a million rows of garbage and segments without number are what it is not to come to.
#[test]
fn a_table_stays_tidy() {
    let queries = by_device(10 * SECOND);
    let query = &queries[0];
    let mut table = sessions::SessionTable::default();
    let mut sizes = BTreeMap::new();
    for i in 0..2_000i64 {
        let key = format!("device-{}", i % 50);
        let rows = [(Some(i * SECOND / 50), Some(key.as_str()), None, Some(1))];
        let mut lane = session_lane::SessionLane::new(query).unwrap();
        let rows = batch(&rows);
        let times = rows.column(0).as_primitive::<TimestampMicrosecondType>();
        lane.update(query, times, &query.key_columns(&rows).unwrap().0, &query.arguments(&rows).unwrap().0, 0).unwrap();
        for (_, partial) in lane.into_partials(query).unwrap() {
            table.merge(query, &partial).unwrap();
        }
        sizes.insert(i, table.size());
    }
    assert_eq!(table.sessions(), 50);
    let (segments, rows) = sizes.values().fold((0, 0), |most, size| (most.0.max(size.0), most.1.max(size.1)));
    assert!(segments <= 12 && rows <= 170, "{segments} segments, {rows} rows");
}
