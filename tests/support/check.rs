//! What a user can prove about the tables, with any reader.

use std::collections::{BTreeMap, BTreeSet};

use super::broker::{Broker, Rec};
use super::floe::{Floe, Pipeline};
use super::reader::Tables;
use super::telemetry::{Telemetry, Truth, Window};

pub const ROWS: &str = "telemetry.events";
pub const WINDOWS: &str = "telemetry.device_minutes";
pub const DEAD_LETTERS: &str = "telemetry.dead_letters";

/// The watermark delay of [`Pipeline::new`].
pub const DELAY_MS: i64 = 2 * 60_000;

/// Offsets by partition.
pub type Produced = BTreeSet<(i32, i64)>;

/// Messages `range` of the stream, as records.
pub fn records(telemetry: &Telemetry, range: std::ops::Range<u64>) -> Vec<Rec> {
    let mut buffer = Vec::new();
    range
        .map(|index| {
            let reading = telemetry.reading(index);
            Rec {
                partition: Some(telemetry.partition(&reading)),
                key: Some(reading.device_id().into_bytes()),
                value: reading.value(&mut buffer).map(<[u8]>::to_vec),
                ..Rec::default()
            }
        })
        .collect()
}

/// A topic with all messages of the stream.
pub fn fill(broker: &Broker, topic: &str, telemetry: &Telemetry) {
    broker.create_topic(topic, telemetry.partitions, &[]);
    broker.produce_records(topic, records(telemetry, 0..telemetry.messages));
}

/// Every offset of a topic without holes.
pub fn produced(broker: &Broker, topic: &str, partitions: i32) -> Produced {
    (0..partitions)
        .flat_map(|partition| {
            let (low, high) = broker.watermarks(topic, partition);
            (low..high).map(move |offset| (partition, offset))
        })
        .collect()
}

/// How many offsets are in the tables now; 0 before there are tables.
pub fn offsets_in_tables(tables: &Tables) -> u64 {
    let sql = "select (select count(*) from {telemetry.events}) \
               + (select count(*) from {telemetry.dead_letters} where \"offset\" is not null)";
    match tables.try_query::<(u64,)>(sql) {
        Ok(rows) => rows[0].0,
        // The first batch creates them.
        Err(e) if e.contains("NoSuch") || e.contains("no such table") || e.contains("unable to open") => 0,
        Err(e) => panic!("{e}"),
    }
}

/// Waits until a running Floe has brought that many offsets into the tables.
pub fn until_in_tables(floe: &mut Floe, tables: &Tables, offsets: u64) {
    floe.until(&format!("{offsets} offsets are in the tables"), |_| {
        (offsets_in_tables(tables) >= offsets).then_some(())
    });
}

/// Each produced offset is in rows or in dead letters, once, and no other offset is.
pub fn each_offset_once(tables: &Tables, topic: &str, produced: &Produced) {
    let found: Vec<(String, i32, i64)> = tables.query(
        "select _kafka_topic, _kafka_partition, _kafka_offset from {telemetry.events} \
         union all \
         select topic, partition, \"offset\" from {telemetry.dead_letters} where reason not in ('data_loss', 'overflow') \
         order by all",
    );
    let mut doubled = Vec::new();
    let mut strange = Vec::new();
    let mut seen = Produced::new();
    for (found_in, partition, offset) in found {
        if found_in != topic || !produced.contains(&(partition, offset)) {
            strange.push((found_in, partition, offset));
        } else if !seen.insert((partition, offset)) {
            doubled.push((partition, offset));
        }
    }
    let missing: Vec<_> = produced.difference(&seen).collect();
    assert!(
        missing.is_empty() && doubled.is_empty() && strange.is_empty(),
        "of {} offsets {} missing {:?}, {} doubled {:?}, {} never produced {:?}",
        produced.len(),
        missing.len(),
        &missing[..missing.len().min(10)],
        doubled.len(),
        &doubled[..doubled.len().min(10)],
        strange.len(),
        &strange[..strange.len().min(10)],
    );
}

/// The rows' values add up to the generator's, and every invalid message is a dead letter with its reason.
pub fn rows_are_true(tables: &Tables, truth: &Truth) {
    let sums: Vec<(u64, i64, i64)> = tables.query(
        "select count(*), coalesce(sum(duration_ms), 0)::bigint, coalesce(sum(battery_level) * 4, 0)::bigint \
         from {telemetry.events}",
    );
    assert_eq!(sums, [(truth.valid, truth.duration_sum, truth.battery_sum)], "rows, sum of durations, of batteries");
    assert_eq!(dead_by_reason(tables), truth.dead, "dead letters by reason");
}

pub fn dead_by_reason(tables: &Tables) -> BTreeMap<String, u64> {
    let rows: Vec<(String, u64)> = tables.query("select reason, count(*) from {telemetry.dead_letters} group by all");
    rows.into_iter().collect()
}

/// Windows by start in milliseconds and device, as they are in the table; panics on a window that is there twice.
pub fn windows(tables: &Tables) -> BTreeMap<(i64, u64), Window> {
    windows_of(tables, "")
}

/// As [`windows`], of a table in update mode: the newest revision of every group.
pub fn latest_windows(tables: &Tables) -> BTreeMap<(i64, u64), Window> {
    windows_of(tables, "qualify row_number() over (partition by window_start, device_id order by revision desc) = 1")
}

fn windows_of(tables: &Tables, which: &str) -> BTreeMap<(i64, u64), Window> {
    type Row = (i64, i64, String, i64, f64, f64, f64, f64, i64);
    let rows: Vec<Row> = tables.query(&format!(
        "select epoch_ms(window_start), epoch_ms(window_end), device_id, events, battery_sum, battery_avg, \
         battery_min, battery_max, duration_sum from {{telemetry.device_minutes}} {which}"
    ));
    let mut windows = BTreeMap::new();
    for (start, end, device, events, sum, avg, min, max, duration_sum) in rows {
        assert_eq!(end - start, 60_000, "window of {device}");
        assert_eq!(avg, sum / events as f64, "average of {device} at {start}");
        let quarters = |v: f64| (v * 4.0) as i64;
        let window = Window {
            events,
            battery_sum: quarters(sum),
            battery_min: quarters(min),
            battery_max: quarters(max),
            duration_sum,
        };
        let number = device.trim_start_matches("dev-").parse().expect("number of a device");
        assert!(windows.insert((start, number), window).is_none(), "window {start} of {device} is there twice");
    }
    windows
}

/// The window table holds exactly these windows.
pub fn windows_are(tables: &Tables, expected: &BTreeMap<(i64, u64), Window>) {
    same_windows(&windows(tables), expected);
}

pub fn same_windows(found: &BTreeMap<(i64, u64), Window>, expected: &BTreeMap<(i64, u64), Window>) {
    if found == expected {
        return;
    }
    let missing: Vec<_> = expected.iter().filter(|(k, _)| !found.contains_key(k)).collect();
    let strange: Vec<_> = found.iter().filter(|(k, _)| !expected.contains_key(k)).collect();
    let wrong: Vec<_> =
        expected.iter().filter_map(|(k, e)| found.get(k).filter(|f| *f != e).map(|f| (k, e, f))).collect();
    panic!(
        "of {} windows {} missing {:?}, {} not expected {:?}, {} wrong (expected, found) {:?}",
        expected.len(),
        missing.len(),
        &missing[..missing.len().min(5)],
        strange.len(),
        &strange[..strange.len().min(5)],
        wrong.len(),
        &wrong[..wrong.len().min(5)],
    );
}

/// Everything at once, for a pipeline that has drained a topic without holes.
pub fn everything(pipeline: &Pipeline, broker: &Broker, telemetry: &Telemetry) {
    let tables = pipeline.tables();
    let truth = telemetry.truth();
    each_offset_once(&tables, &pipeline.topic, &produced(broker, &pipeline.topic, telemetry.partitions));
    rows_are_true(&tables, &truth);
    windows_are(&tables, &truth.closed(pipeline.delay_ms()));
}
