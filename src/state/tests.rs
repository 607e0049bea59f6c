use std::collections::BTreeMap;
use std::sync::Arc;
use std::time::{Duration, Instant};

use arrow::array::{
    Array, ArrayRef, AsArray, BooleanArray, Float64Array, Int64Array, StringArray, TimestampMicrosecondArray,
};
use arrow::compute::concat_batches;
use arrow::datatypes::{DataType, Date32Type, Field, Float64Type, Int32Type, Int64Type, Schema, SchemaRef, TimeUnit};
use arrow::record_batch::RecordBatch;
use arrow::row::{RowConverter, SortField};

use super::table::Table;
use super::{ClosedWindow, Delta, Error, Groups, Lane, StateStore, Window, WindowQuery};
use crate::config::{OutputMode, TableConfig, WindowConfig};
use crate::window::Windowing;

pub(crate) const MINUTE: i64 = 60_000_000;
pub(crate) const NEVER: i64 = i64::MIN / 1000;
const END: i64 = i64::MAX / 1000 + 1;

pub(crate) fn config(size_us: u64, group_by: &[&str], aggregates: &[(&str, &str)]) -> WindowConfig {
    WindowConfig {
        of: 0,
        table: TableConfig {
            table: "telemetry.minutes".to_string(),
            partition_by: Vec::new(),
            sort_by: Vec::new(),
            properties: Default::default(),
            provenance: false,
        },
        windowing: Windowing::new(Duration::from_micros(size_us), None, Duration::ZERO, None).unwrap(),
        output_mode: OutputMode::Append,
        filter: None,
        late_table: None,
        group_by: group_by.iter().map(|s| s.to_string()).collect(),
        aggregates: aggregates.iter().map(|(n, e)| (n.to_string(), e.to_string())).collect(),
    }
}

pub(super) fn schema() -> SchemaRef {
    Arc::new(Schema::new(vec![
        Field::new("t", DataType::Timestamp(TimeUnit::Microsecond, Some("+00:00".into())), true),
        Field::new("device", DataType::Utf8, true),
        Field::new("x", DataType::Float64, true),
        Field::new("n", DataType::Int64, true),
        Field::new("b", DataType::Boolean, true),
    ]))
}

pub(crate) type Row<'a> = (Option<i64>, Option<&'a str>, Option<f64>, Option<i64>);

pub(crate) fn batch(rows: &[Row]) -> RecordBatch {
    let t = TimestampMicrosecondArray::from_iter(rows.iter().map(|r| r.0)).with_timezone("+00:00");
    let columns: Vec<ArrayRef> = vec![
        Arc::new(t),
        Arc::new(StringArray::from_iter(rows.iter().map(|r| r.1))),
        Arc::new(Float64Array::from_iter(rows.iter().map(|r| r.2))),
        Arc::new(Int64Array::from_iter(rows.iter().map(|r| r.3))),
        Arc::new(BooleanArray::from_iter(rows.iter().map(|r| r.3.map(|n| n % 2 == 0)))),
    ];
    RecordBatch::try_new(schema(), columns).unwrap()
}

pub(crate) fn queries(configs: &[WindowConfig]) -> Arc<[WindowQuery]> {
    configs.iter().map(|c| WindowQuery::compile(c, &schema(), "t").unwrap()).collect()
}

pub(super) const ALL: [(&str, &str); 9] = [
    ("events", "count(*)"),
    ("some", "COUNT(x)"),
    ("sum_x", "sum(x)"),
    ("sum_n", "sum(n)"),
    ("avg_x", "avg(x)"),
    ("avg_n", "avg(n)"),
    ("min_x", "min(x)"),
    ("max_x", "max(x)"),
    ("max_d", "max(device)"),
];

pub(crate) fn lane(queries: &Arc<[WindowQuery]>, batches: &[RecordBatch], late_ms: i64) -> Lane {
    let mut lane = Lane::new(queries.clone(), (0..queries.len()).collect(), 0, late_ms);
    for batch in batches {
        lane.update(batch).unwrap();
    }
    lane
}

pub(super) fn close_all(store: &mut StateStore) -> (Vec<RecordBatch>, u64) {
    let mut batches = Vec::new();
    let mut overflowed = 0;
    for window in close(store, END) {
        let (rows, count) = window.evaluate().unwrap();
        batches.extend(rows);
        overflowed += count;
    }
    (batches, overflowed)
}

pub(super) fn close(store: &mut StateStore, evict_ms: i64) -> Vec<ClosedWindow> {
    let mut windows = Vec::new();
    for closing in store.close(evict_ms) {
        let keep = |window| {
            windows.push(window);
            Ok::<_, Error>(())
        };
        closing.windows(keep).unwrap();
    }
    windows
}

fn run(configs: &[WindowConfig], rows: &[Row]) -> (RecordBatch, u64) {
    let queries = queries(configs);
    let mut store = StateStore::new(queries.clone());
    store.merge_lanes(vec![lane(&queries, &[batch(rows)], NEVER)], NEVER, 1).unwrap();
    let (batches, overflowed) = close_all(&mut store);
    (concat_batches(&queries[0].output_schema(), &batches).unwrap(), overflowed)
}

/// Rows of many devices over some minutes, from a seed.
pub(super) fn stream(seed: u64, rows: usize) -> RecordBatch {
    let mut state = seed.wrapping_mul(0x9E37_79B9_7F4A_7C15) | 1;
    let mut next = move || {
        state ^= state << 13;
        state ^= state >> 7;
        state ^= state << 17;
        state
    };
    let devices: Vec<String> = (0..50).map(|i| format!("device-{i}")).collect();
    let rows: Vec<Row> = (0..rows)
        .map(|_| {
            let time = (next() % (12 * MINUTE as u64)) as i64;
            let device = devices.get((next() % 53) as usize).map(String::as_str);
            let x = (next() % 11 != 0).then(|| (next() as f64) / 1e13 - 3e5);
            (Some(time), device, x, Some(next() as i64 >> 8))
        })
        .collect();
    batch(&rows)
}

#[test]
fn every_aggregate_of_one_window() {
    let rows = [
        (Some(1), Some("a"), Some(1.5), Some(4)),
        (Some(2), Some("a"), None, Some(5)),
        (Some(3), None, Some(f64::NAN), None),
        (Some(4), Some("a"), Some(f64::NEG_INFINITY), Some(-1)),
        (Some(5), None, Some(2.0), None),
    ];
    let (out, overflowed) = run(&[config(MINUTE as u64, &["device"], &ALL)], &rows);
    assert_eq!(overflowed, 0);
    assert_eq!(out.num_rows(), 2);
    assert_eq!(out.column(2).as_string::<i32>().iter().collect::<Vec<_>>(), [Some("a"), None]);
    assert_eq!(out.column(3).as_primitive::<Int64Type>().values(), &[3, 2]);
    assert_eq!(out.column(4).as_primitive::<Int64Type>().values(), &[2, 2]);
    assert_eq!(out.column(5).as_primitive::<Float64Type>().value(0), f64::NEG_INFINITY);
    let sums = out.column(6).as_primitive::<Int64Type>();
    assert_eq!((sums.value(0), sums.is_null(1)), (8, true));
    assert_eq!(out.column(8).as_primitive::<Float64Type>().value(0), 8.0 / 3.0);
    assert_eq!(out.column(9).as_primitive::<Float64Type>().values(), &[f64::NEG_INFINITY, 2.0]);
    assert_eq!(out.column(10).as_primitive::<Float64Type>().value(0), 1.5);
    assert!(out.column(10).as_primitive::<Float64Type>().value(1).is_nan());
    assert_eq!(out.column(11).as_string::<i32>().value(0), "a");
    assert!(out.column(11).is_null(1));
    assert_eq!(out.schema().field(0).name(), "window_start");
    assert!(!out.schema().field(3).is_nullable() && out.schema().field(6).is_nullable());
}

#[test]
fn keys_of_every_flat_type_and_none() {
    let rows = [
        (Some(1), Some("a"), Some(-0.0), Some(2)),
        (Some(2), Some("a"), Some(0.0), Some(2)),
        (Some(3), Some("a"), Some(f64::NAN), Some(2)),
        (Some(4), Some("a"), Some(-f64::NAN), Some(2)),
        (Some(5), Some("a"), None, Some(2)),
    ];
    let count = [("events", "count(*)")];
    for keys in [&["x"][..], &["x", "device"], &["b", "x", "n"]] {
        let (out, _) = run(&[config(MINUTE as u64, keys, &count)], &rows);
        let x = out.column_by_name("x").unwrap().as_primitive::<Float64Type>();
        assert_eq!(out.num_rows(), 3, "{keys:?}");
        assert_eq!(x.value(0).to_bits(), 0.0f64.to_bits());
        assert!(x.value(1).is_nan() && x.is_null(2));
        assert_eq!(out.column_by_name("events").unwrap().as_primitive::<Int64Type>().values(), &[2, 2, 1]);
    }
    for (keys, groups) in [(&[][..], 1), (&["b"], 1), (&["n"], 1), (&["t"], 5), (&["t", "b"], 5)] {
        assert_eq!(run(&[config(MINUTE as u64, keys, &count)], &rows).0.num_rows(), groups, "{keys:?}");
    }
    let input = Schema::new(vec![
        schema().field(0).clone(),
        Field::new("d", DataType::Date32, true),
        Field::new("i", DataType::Int32, true),
    ]);
    let query = WindowQuery::compile(&config(1000, &["d", "i"], &count), &Arc::new(input.clone()), "t").unwrap();
    let queries: Arc<[WindowQuery]> = vec![query].into();
    let d: ArrayRef = Arc::new(arrow::array::PrimitiveArray::<Date32Type>::from(vec![1, 1, 2]));
    let i: ArrayRef = Arc::new(arrow::array::PrimitiveArray::<Int32Type>::from(vec![Some(1), Some(1), None]));
    let t: ArrayRef = Arc::new(TimestampMicrosecondArray::from(vec![5, 6, 7]).with_timezone("+00:00"));
    let mut store = StateStore::new(queries.clone());
    let rows = RecordBatch::try_new(Arc::new(input), vec![t, d, i]).unwrap();
    store.merge_lanes(vec![lane(&queries, &[rows], NEVER)], NEVER, 1).unwrap();
    assert_eq!(store.stats().queries[0].groups, 2);
    assert!(store.stats().queries[0].bytes > 0);
}

#[test]
fn an_integer_sum_never_wraps() {
    let rows = [
        (Some(1), Some("over"), None, Some(i64::MAX)),
        (Some(1), Some("over"), None, Some(1)),
        (Some(1), Some("back"), None, Some(i64::MAX)),
        (Some(1), Some("back"), None, Some(10)),
        (Some(1), Some("back"), None, Some(-11)),
        (Some(1), Some("under"), None, Some(i64::MIN)),
        (Some(1), Some("under"), None, Some(-1)),
        (Some(1), Some("edge"), None, Some(i64::MIN)),
    ];
    let (out, overflowed) = run(&[config(MINUTE as u64, &["device"], &[("s", "sum(n)"), ("c", "count(*)")])], &rows);
    let sums: Vec<Option<i64>> = out.column(3).as_primitive::<Int64Type>().iter().collect();
    assert_eq!(sums, [None, Some(i64::MAX - 1), None, Some(i64::MIN)]);
    assert_eq!(overflowed, 2);
}

#[test]
fn an_expression_that_fails_on_a_row_counts_as_null_there() {
    let configs = [config(MINUTE as u64, &[], &[("s", "sum(10 / n)"), ("c", "count(*)")])];
    let queries = queries(&configs);
    let rows = batch(&[(Some(1), None, None, Some(5)), (Some(2), None, None, Some(0)), (Some(3), None, None, Some(2))]);
    let lane = lane(&queries, &[rows], NEVER);
    assert_eq!(lane.failed_values(), [1]);
    let mut store = StateStore::new(queries);
    store.merge_lanes(vec![lane], NEVER, 1).unwrap();
    let (out, _) = close_all(&mut store);
    assert_eq!(out[0].column(2).as_primitive::<Int64Type>().value(0), 7);
    assert_eq!(out[0].column(3).as_primitive::<Int64Type>().value(0), 3);
}

#[test]
fn late_rows_and_rows_without_time_are_counted_exactly() {
    let queries = queries(&[config(MINUTE as u64, &["device"], &ALL), config(10, &[], &[("c", "count(*)")])]);
    let rows = [
        (Some(MINUTE - 1), Some("a"), None, None),
        (Some(MINUTE), Some("a"), None, None),
        (None, Some("a"), None, None),
        (Some(-5), Some("a"), None, None),
    ];
    let lane = lane(&queries, &[batch(&rows), batch(&[])], 60_000);
    assert_eq!(lane.late_rows(), [2, 2]);
    assert_eq!(lane.rows_without_time(), 1);
    assert_eq!(lane.max_event_time_us(), Some(MINUTE));
    let before = super::tests::lane(&queries, &[batch(&rows[3..])], 0);
    assert_eq!((before.max_event_time_us(), before.late_rows()), (Some(-5), &[1, 1][..]));
    let null = super::tests::lane(&queries, &[batch(&rows[2..])], 0);
    assert_eq!(null.max_event_time_us(), Some(0));
    assert_eq!(super::tests::lane(&queries, &[batch(&[])], 0).max_event_time_us(), None);
}

#[test]
fn a_row_is_in_every_sliding_window_that_holds_it_and_late_for_some() {
    let mut sliding = config(10, &[], &[("c", "count(*)"), ("s", "sum(n)")]);
    let micros = Duration::from_micros;
    sliding.windowing = Windowing::new(micros(10_000), Some(micros(4_000)), micros(1_000), None).unwrap();
    let queries = queries(&[sliding]);
    // windows begin at 1, 5, 9, 13 … ms; the watermark is at 15 ms: [5, 15) is closed, [9, 19) is not
    let times = [14_999, 5_000, 15_000, 14_000, 18_999, 4_999];
    let rows: Vec<Row> = times.iter().enumerate().map(|(i, t)| (Some(*t), None, None, Some(1 << i))).collect();
    let batch = batch(&rows);
    let lane = lane(&queries, std::slice::from_ref(&batch), 15);
    assert_eq!(lane.late_rows(), [7]);
    let late = queries[0].late_rows(&batch, 0, 15).unwrap();
    let found: Vec<_> = late.into_iter().map(|late| (late.start_us, late.end_us, late.rows)).collect();
    assert_eq!(found, [(-3_000, 7_000, vec![1, 5]), (1_000, 11_000, vec![1, 5]), (5_000, 15_000, vec![0, 1, 3])]);
    assert_eq!(queries[0].late_rows(&batch, 0, 6).unwrap(), []);
    let mut store = StateStore::new(queries);
    store.merge_lanes(vec![lane], 15, 1).unwrap();
    let (out, _) = close_all(&mut store);
    let windows: Vec<(i64, i64, i64)> = out
        .iter()
        .map(|window| {
            let start = window.column(0).as_primitive::<arrow::datatypes::TimestampMicrosecondType>().value(0);
            let number = |column: usize| window.column(column).as_primitive::<Int64Type>().value(0);
            (start, number(2), number(3))
        })
        .collect();
    assert_eq!(windows, [(9_000, 4, 1 + 4 + 8 + 16), (13_000, 4, 1 + 4 + 8 + 16), (17_000, 1, 16)]);
}

#[test]
fn a_filter_takes_rows_out_of_the_windows_and_not_out_of_the_watermark() {
    let mut filtered = config(MINUTE as u64, &["device"], &[("c", "count(*)"), ("s", "sum(n)")]);
    filtered.filter = Some("10 / n > 1 AND device <> 'x'".to_string());
    let queries = queries(&[filtered, config(MINUTE as u64, &[], &[("c", "count(*)")])]);
    let rows = batch(&[
        (Some(MINUTE), Some("a"), None, Some(1)),
        (Some(9 * MINUTE), Some("x"), None, Some(1)),
        (Some(MINUTE), Some("a"), None, Some(0)),
        (Some(MINUTE), Some("a"), None, Some(10)),
        (Some(MINUTE), Some("a"), None, None),
        (Some(1), Some("a"), None, Some(2)),
        (Some(2), Some("x"), None, Some(2)),
        (None, Some("a"), None, Some(2)),
    ]);
    let lane = lane(&queries, std::slice::from_ref(&rows), 60_000);
    assert_eq!(lane.max_event_time_us(), Some(9 * MINUTE), "the row that gives it is filtered");
    assert_eq!(lane.late_rows(), [1, 2], "of the rows that the filter keeps");
    assert_eq!(lane.failed_values(), [1, 0], "a division by zero");
    assert_eq!(
        queries[0].late_rows(&rows, 0, 60_000).unwrap().into_iter().flat_map(|l| l.rows).collect::<Vec<_>>(),
        [5]
    );
    let mut store = StateStore::new(queries.clone());
    store.merge_lanes(vec![lane], 60_000, 1).unwrap();
    assert_eq!(store.stats().queries.iter().map(|q| q.open_windows).collect::<Vec<_>>(), [1, 2]);
    let (out, _) = close_all(&mut store);
    assert_eq!(out[0].column(4).as_primitive::<Int64Type>().values(), &[1]);
}

#[test]
fn times_at_the_ends_of_the_range() {
    let times = [i64::MIN, i64::MIN + 1, -1, 0, i64::MAX - 1, i64::MAX];
    let rows: Vec<Row> = times.iter().map(|t| (Some(*t), Some("a"), None, Some(1))).collect();
    let (out, _) = run(&[config(MINUTE as u64, &["device"], &[("c", "count(*)")])], &rows);
    let bounds: Vec<(i64, i64, i64)> = (0..out.num_rows())
        .map(|i| {
            let time = |c: usize| out.column(c).as_primitive::<arrow::datatypes::TimestampMicrosecondType>().value(i);
            (time(0), time(1), out.column(3).as_primitive::<Int64Type>().value(i))
        })
        .collect();
    assert_eq!(bounds.len(), 4);
    assert_eq!((bounds[0].0, bounds[0].2), (i64::MIN, 2));
    assert_eq!(bounds[1], (-MINUTE, 0, 1));
    assert_eq!((bounds[3].1, bounds[3].2), (i64::MAX, 2));
}

#[test]
fn many_windows_in_one_chunk() {
    let rows: Vec<Row> = (0..1000).map(|i| (Some((i * 7919) % 100 * MINUTE), Some("a"), None, Some(i))).collect();
    let (out, _) = run(&[config(MINUTE as u64, &["device"], &[("c", "count(*)")])], &rows);
    assert_eq!(out.num_rows(), 100);
    assert!(out.column(3).as_primitive::<Int64Type>().values().iter().all(|c| *c == 10));
}

#[test]
fn the_result_does_not_depend_on_workers_or_chunks() {
    let mut sliding = config(3 * MINUTE as u64, &["b"], &ALL);
    let micros = |us: i64| Duration::from_micros(us as u64);
    sliding.windowing = Windowing::new(micros(3 * MINUTE), Some(micros(MINUTE)), micros(7), None).unwrap();
    let configs = [config(MINUTE as u64, &["device"], &ALL), config(3 * MINUTE as u64, &[], &ALL), sliding];
    let queries = queries(&configs);
    let lanes = |chunk: usize| -> Vec<Lane> {
        (0..5)
            .map(|p| {
                let rows = stream(p + 1, 3000);
                let chunks: Vec<_> = (0..3000).step_by(chunk).map(|i| rows.slice(i, chunk.min(3000 - i))).collect();
                lane(&queries, &chunks, 0)
            })
            .collect()
    };
    let outcome = |chunk, workers| {
        let mut store = StateStore::new(queries.clone());
        let first = store.merge_lanes(lanes(chunk), 120_000, workers).unwrap();
        let in_shards = |w: &Window| matches!(&w.groups, Groups::Resident(Table::Window(table)) if table.bits() > 0);
        assert!(store.open.values().any(in_shards) && !store.open.values().all(in_shards));
        let second = store.merge_lanes(lanes(chunk), 120_000, workers).unwrap();
        let rows = close_all(&mut store).0;
        (first.bytes, second.bytes, bits(&rows))
    };
    let expected = outcome(3000, 1);
    assert!(expected == outcome(3000, 4));
    assert!(expected == outcome(97, 2));
}

/// Rows as bytes, in which NaN and the sign of zero count and the order of the rows does not.
pub(super) fn canonical(batches: &[RecordBatch]) -> Vec<(String, Vec<u8>)> {
    let mut rows = Vec::new();
    for batch in batches {
        let fields = batch.schema().fields().iter().map(|f| SortField::new(f.data_type().clone())).collect();
        let converted = RowConverter::new(fields).unwrap().convert_columns(batch.columns()).unwrap();
        let columns = batch.schema().fields().iter().map(|f| f.name().as_str()).collect::<Vec<_>>().join(" ");
        rows.extend(converted.iter().map(|row| (columns.clone(), row.as_ref().to_vec())));
    }
    rows.sort();
    rows
}

/// Batches as bytes, so that NaN and the sign of zero count.
pub(super) fn bits(batches: &[RecordBatch]) -> Vec<u8> {
    let mut writer = Vec::new();
    for batch in batches {
        let mut stream = arrow::ipc::writer::StreamWriter::try_new(&mut writer, &batch.schema()).unwrap();
        stream.write(batch).unwrap();
    }
    writer
}

#[test]
fn merging_deltas_equals_the_unbroken_state() {
    let queries = queries(&[config(MINUTE as u64, &["device"], &ALL), config(2 * MINUTE as u64, &["b"], &ALL)]);
    let mut store = StateStore::new(queries.clone());
    let mut deltas: Vec<Delta> = Vec::new();
    let mut evict_ms = 0;
    for n in 0..6 {
        let lanes = (0..3).map(|p| lane(&queries, &[stream(10 * n + p, 500)], evict_ms)).collect();
        evict_ms = n as i64 * 60_000;
        deltas.push(store.merge_lanes(lanes, evict_ms, 2).unwrap());
        store.close(evict_ms);
    }
    let mut recovered = StateStore::new(queries);
    deltas.iter().for_each(|delta| recovered.apply(delta, evict_ms).unwrap());
    assert_eq!(recovered.stats().queries[0].open_windows, store.stats().queries[0].open_windows);
    let unbroken = canonical(&close_all(&mut store).0);
    assert!(!unbroken.is_empty() && unbroken == canonical(&close_all(&mut recovered).0));
}

#[test]
fn a_window_grows_from_few_groups_to_many() {
    let queries = queries(&[config(MINUTE as u64, &["device", "n"], &[("c", "count(*)"), ("s", "sum(x)")])]);
    let ids: Vec<String> = (0..40).map(|i| format!("d{i}")).collect();
    let mut lane = Lane::new(queries.clone(), (0..queries.len()).collect(), 0, NEVER);
    for round in 0..3 {
        for (i, id) in ids.iter().enumerate() {
            let device = (i != 3).then_some(id.as_str());
            lane.update(&batch(&[(Some(round), device, Some(i as f64), None)])).unwrap();
        }
    }
    let mut store = StateStore::new(queries);
    store.merge_lanes(vec![lane], NEVER, 1).unwrap();
    let (out, _) = close_all(&mut store);
    assert_eq!(out[0].num_rows(), 40);
    assert!(out[0].column(4).as_primitive::<Int64Type>().values().iter().all(|c| *c == 3));
    let (devices, sums) = (out[0].column(2).as_string::<i32>(), out[0].column(5).as_primitive::<Float64Type>());
    let sums: BTreeMap<_, _> = devices.iter().map(|d| d.unwrap_or("d3")).zip(sums.values()).collect();
    assert_eq!(sums.len(), 40);
    assert!(ids.iter().enumerate().all(|(i, id)| *sums[id.as_str()] == 3.0 * i as f64));
}

#[test]
fn sparse_windows_take_little_memory() {
    let queries = queries(&[config(MINUTE as u64, &["device"], &ALL)]);
    let rows: Vec<Row> = (0..5_000).map(|i| (Some(i * MINUTE), Some("a"), Some(1.0), Some(1))).collect();
    let lane = lane(&queries, &[batch(&rows)], NEVER);
    assert!(lane.bytes() / 5_000 < 2_000, "{} bytes a window", lane.bytes() / 5_000);
    let mut store = StateStore::new(queries);
    store.merge_lanes(vec![lane], NEVER, 2).unwrap();
    assert_eq!(store.stats().queries[0].open_windows, 5_000);
}

#[test]
fn closed_windows_are_not_in_the_delta() {
    let queries = queries(&[config(MINUTE as u64, &["device"], &ALL)]);
    let mut store = StateStore::new(queries.clone());
    let delta = store.merge_lanes(vec![lane(&queries, &[stream(1, 900)], 0)], 12 * 60_000, 2).unwrap();
    assert_eq!((delta.groups, delta.max_window_end_us), (0, None));
    assert_eq!(store.close(12 * 60_000).len(), 12);
    let mut recovered = StateStore::new(queries);
    recovered.apply(&delta, 0).unwrap();
    assert_eq!(recovered.stats().queries[0].open_windows, 0);
}

#[test]
fn large_windows_come_in_several_batches() {
    let ids: Vec<String> = (0..70_000).map(|i| format!("d{i}")).collect();
    let rows: Vec<Row> = ids.iter().map(|id| (Some(1), Some(id.as_str()), Some(1.0), Some(1))).collect();
    let queries = queries(&[config(MINUTE as u64, &["device"], &ALL)]);
    let mut store = StateStore::new(queries.clone());
    store.merge_lanes(vec![lane(&queries, &[batch(&rows)], NEVER)], END, 1).unwrap();
    let (batches, _) = close_all(&mut store);
    assert_eq!(batches.iter().map(RecordBatch::num_rows).collect::<Vec<_>>(), [65_536, 4_464]);
}

#[test]
fn other_aggregates_are_refused_with_the_choices() {
    let mistakes = [
        ("a", "median(x)"),
        ("b", "x + sum(x)"),
        ("c", "x"),
        ("d", "array_agg(x)"),
        ("e", "sum(device)"),
        ("f", "sum(nothing)"),
        ("g", "sum(x) filter (where x)"),
        ("window_start", "count(*)"),
        ("h", "sum(x"),
        ("i", "sum(x) over ()"),
        ("j", "row_number() over (order by t)"),
        ("device", "count(*)"),
        ("k", "sum(sum(x))"),
        ("l", "max(now())"),
    ];
    let errors = WindowQuery::compile(&config(1, &["device", "place"], &mistakes), &schema(), "when").err().unwrap();
    println!("{errors:#?}");
    assert_eq!(errors.len(), 16, "{errors:#?}");
    assert!(errors.iter().any(|e| e.contains("place") && e.contains("there are t, device, x, n, b")));
    let fine = [("a", "min(b)"), ("b", "max(t)"), ("c", "avg(n + 1)"), ("d", "sum(CASE WHEN b THEN 1 ELSE 0 END)")];
    let query = WindowQuery::compile(&config(1, &[], &fine), &schema(), "t").unwrap();
    let types: Vec<String> = query.output_schema().fields().iter().map(|f| f.data_type().to_string()).collect();
    assert_eq!(types[2..], ["Boolean", "Timestamp(µs, \"+00:00\")", "Float64", "Int64"]);
    let (out, _) = run(&[config(1, &[], &fine)], &[(Some(7), None, None, Some(3)), (Some(7), None, None, Some(4))]);
    assert!(!out.column(2).as_boolean().value(0));
    assert_eq!(out.column(5).as_primitive::<Int64Type>().value(0), 1);
}

#[test]
fn any_stream_equals_a_naive_model() {
    type Groups = BTreeMap<(i64, Option<String>), (i64, Option<i64>, Option<f64>)>;
    let aggregates = [("c", "count(*)"), ("s", "sum(n)"), ("m", "min(x)")];
    let queries = queries(&[config(MINUTE as u64, &["device"], &aggregates)]);
    for seed in 1..20 {
        let mut store = StateStore::new(queries.clone());
        let (mut model, mut emitted): (Groups, Groups) = Default::default();
        let (mut late_ms, mut evict_ms, mut late, mut model_late) = (0, 0, 0, 0);
        for n in 0..6u64 {
            let parts: Vec<RecordBatch> = (0..3).map(|p| stream(seed * 100 + n * 10 + p, 80)).collect();
            for part in &parts {
                let times = part.column(0).as_primitive::<arrow::datatypes::TimestampMicrosecondType>();
                for row in 0..part.num_rows() {
                    let start = times.value(row) / MINUTE * MINUTE;
                    if start + MINUTE <= late_ms * 1000 {
                        model_late += 1;
                        continue;
                    }
                    let device = part.column(1).as_string::<i32>();
                    let device = device.is_valid(row).then(|| device.value(row).to_string());
                    let group = model.entry((start, device)).or_default();
                    group.0 += 1;
                    group.1 = Some(group.1.unwrap_or(0) + part.column(3).as_primitive::<Int64Type>().value(row));
                    let x = part.column(2).as_primitive::<Float64Type>();
                    if x.is_valid(row) {
                        group.2 = Some(group.2.map_or(x.value(row), |m| m.min(x.value(row))));
                    }
                }
            }
            let lanes: Vec<Lane> = parts.iter().map(|p| lane(&queries, std::slice::from_ref(p), late_ms)).collect();
            late += lanes.iter().map(|l| l.late_rows()[0]).sum::<u64>();
            store.merge_lanes(lanes, evict_ms, 2).unwrap();
            let last = if n == 5 { i64::MAX / 1000 + 1 } else { evict_ms };
            for window in close(&mut store, last) {
                let start = window.start_us();
                for batch in window.evaluate().unwrap().0 {
                    for row in 0..batch.num_rows() {
                        let device = batch.column(2).as_string::<i32>();
                        let device = device.is_valid(row).then(|| device.value(row).to_string());
                        let sum = batch.column(4).as_primitive::<Int64Type>();
                        let min = batch.column(5).as_primitive::<Float64Type>();
                        let group = (
                            batch.column(3).as_primitive::<Int64Type>().value(row),
                            sum.is_valid(row).then(|| sum.value(row)),
                            min.is_valid(row).then(|| min.value(row)),
                        );
                        assert!(emitted.insert((start, device), group).is_none(), "a group came out twice");
                    }
                }
            }
            late_ms = evict_ms;
            evict_ms += 100_000;
        }
        assert_eq!(emitted, model, "seed {seed}");
        assert_eq!(late, model_late, "seed {seed}");
        assert!(late > 0);
    }
}

/// `cargo test --release --lib state::tests::timing -- --ignored --nocapture`
#[test]
#[ignore = "a measurement, not a test"]
fn timing() {
    const DEVICES: u64 = 100_000;
    const ROWS: usize = 4_000_000;
    const CHUNK: usize = 20_000;
    const LANES: usize = 8;
    let aggregates = [("c", "count(*)"), ("a", "avg(x)"), ("l", "min(x)"), ("h", "max(x)"), ("s", "sum(n)")];
    let queries = queries(&[config(MINUTE as u64, &["device"], &aggregates)]);
    let ids: Vec<String> = (0..DEVICES).map(|i| format!("device-{i:06}")).collect();
    let chunks: Vec<RecordBatch> = (0..ROWS / CHUNK)
        .map(|c| {
            let rows: Vec<Row> = (0..CHUNK)
                .map(|r| {
                    let n = (c * CHUNK + r) as u64;
                    let hash = n.wrapping_mul(0x9E37_79B9_7F4A_7C15) ^ (n << 17);
                    let time = n as i64 * 360 + (hash >> 30) as i64 % 30_000_000;
                    let device = (hash >> 20) % DEVICES / LANES as u64 * LANES as u64 + (c % LANES) as u64;
                    (Some(time), Some(ids[device as usize].as_str()), Some(hash as f64), Some(n as i64))
                })
                .collect();
            batch(&rows)
        })
        .collect();
    let mut store = StateStore::new(queries.clone());
    let (mut update, mut merge, mut groups, mut bytes) = (Duration::ZERO, Duration::ZERO, 0, 0);
    for part in chunks.chunks(50) {
        let begin = Instant::now();
        let mut lanes: Vec<Lane> =
            (0..LANES).map(|_| Lane::new(queries.clone(), (0..queries.len()).collect(), 0, 0)).collect();
        for (i, chunk) in part.iter().enumerate() {
            lanes[i % LANES].update(chunk).unwrap();
        }
        update += begin.elapsed();
        let begin = Instant::now();
        let delta = store.merge_lanes(lanes, 0, 1).unwrap();
        merge += begin.elapsed();
        groups += delta.groups;
        bytes += delta.bytes.len();
    }
    let memory = store.stats().queries[0].clone();
    let begin = Instant::now();
    let rows: usize = close_all(&mut store).0.iter().map(RecordBatch::num_rows).sum();
    let close = begin.elapsed();
    let per = |d: Duration, n: usize| d.as_nanos() as f64 / n as f64;
    println!("update {:.0} ns/row", per(update, ROWS));
    println!(
        "merge + encode {:.0} ns/group ({groups} groups, {} bytes each)",
        per(merge, groups as usize),
        bytes / groups as usize
    );
    println!("close {:.0} ns/group", per(close, rows));
    println!(
        "{} groups in {} windows, {} bytes each",
        memory.groups,
        memory.open_windows,
        memory.bytes / memory.groups
    );
}
