use crate::support::broker::{Broker, Rec};
use crate::support::check::{
    DELAY_MS, everything, offsets_in_tables, records, rows_are_true, until_in_tables, windows, windows_are,
};
use crate::support::floe::Pipeline;
use crate::support::telemetry::{MINUTE_MS, START_MS, Telemetry, Truth};
use crate::support::turn;

/// Disorder as large as the watermark's delay allows, in many batches, with a restart after each slice: as if it had been
/// one batch without disorder.
#[test]
fn equal_the_truth_under_disorder_and_across_restarts() {
    let _turn = turn();
    let broker = Broker::shared();
    let topic = "disorder";
    let telemetry =
        Telemetry { messages: 6_000, devices: 20, disorder_ms: DELAY_MS - 1, partitions: 3, ..Telemetry::default() };
    broker.create_topic(topic, telemetry.partitions, &[]);
    let mut pipeline = Pipeline::new(&broker.bootstrap, topic);
    for slice in 0..6 {
        broker.produce_records(topic, records(&telemetry, slice * 1_000..(slice + 1) * 1_000));
        pipeline.set("source.max_offsets_per_trigger", 130 + 200 * slice as i64);
        pipeline.run();
    }
    everything(&pipeline, broker, &telemetry);
}

/// Windows appear as soon as the watermark has passed them, and not before.
#[test]
fn appear_when_the_watermark_has_passed_them() {
    let _turn = turn();
    let broker = Broker::shared();
    let topic = "watermark";
    let telemetry = Telemetry { messages: 2_000, ..Telemetry::default() };
    broker.create_topic(topic, telemetry.partitions, &[]);
    let pipeline = Pipeline::new(&broker.bootstrap, topic);
    let mut truth = Truth::default();
    for slice in 0..4 {
        let range = slice * 500..(slice + 1) * 500;
        broker.produce_records(topic, records(&telemetry, range.clone()));
        range.for_each(|index| truth.add(&telemetry.reading(index)));
        pipeline.run();
        windows_are(&pipeline.tables(), &truth.closed(DELAY_MS));
    }
}

fn reading(device: u64, event_ms: i64) -> Rec {
    let mut reading = Telemetry { invalid_per_mille: 0, ..Telemetry::default() }.reading(device);
    (reading.device, reading.event_ms) = (device, event_ms);
    let value = reading.value(&mut Vec::new()).map(<[u8]>::to_vec);
    Rec { partition: Some(0), value, ..Rec::default() }
}

/// Late is what belongs to a window that is closed: it stays a row, is in no window, and is counted.
#[test]
fn late_rows_are_counted_and_closed_windows_stay_as_they_are() {
    let _turn = turn();
    let broker = Broker::shared();
    let topic = "late";
    broker.create_topic(topic, 1, &[]);
    let mut pipeline = Pipeline::new(&broker.bootstrap, topic);
    pipeline.service("100 ms").set("event_time.watermark_delay", "2 minutes");
    let tables = pipeline.tables();
    let mut floe = pipeline.spawn();
    let at = |minute: i64, second: i64| START_MS + minute * MINUTE_MS + second * 1000;

    // The watermark goes to minute 8: windows up to [7, 8) close, and of them three have a row.
    broker.produce_records(
        topic,
        [reading(1, at(0, 5)), reading(1, at(1, 5)), reading(2, at(7, 59)), reading(1, at(10, 0))],
    );
    until_in_tables(&mut floe, &tables, 4);
    let closed_windows = |count: usize| {
        let count_of = || tables.try_query::<(usize,)>("select count(*) from {telemetry.device_minutes}");
        move |_: &_| count_of().is_ok_and(|rows| rows[0].0 >= count).then_some(())
    };
    floe.until("three windows are closed", closed_windows(3));
    let before = windows(&tables);
    assert_eq!(before.keys().copied().collect::<Vec<_>>(), [(at(0, 0), 1), (at(1, 0), 1), (at(7, 0), 2)]);

    // Late: closed windows, one with a group and two without. Not late: minute 8 begins where the watermark stands.
    broker.produce_records(
        topic,
        [
            reading(1, at(0, 30)),
            reading(3, at(3, 0)),
            reading(2, at(7, 59)),
            reading(1, at(8, 0)),
            reading(1, at(9, 59)),
        ],
    );
    until_in_tables(&mut floe, &tables, 9);
    floe.until("three late rows are counted", |floe| (floe.metric("floe_late_rows_total")? == 3.0).then_some(()));
    assert_eq!(windows(&tables), before);

    // The watermark goes to minute 18, and closes what was in time.
    broker.produce_records(topic, [reading(1, at(20, 0))]);
    floe.until("six windows are closed", closed_windows(6));
    let after = windows(&tables);
    let new: Vec<_> = after.iter().filter(|(k, _)| !before.contains_key(k)).map(|(k, w)| (*k, w.events)).collect();
    assert_eq!(new, [((at(8, 0), 1), 1), ((at(9, 0), 1), 1), ((at(10, 0), 1), 1)]);
    assert!(before.iter().all(|(k, w)| after[k] == *w));
    assert_eq!(offsets_in_tables(&tables), 10, "late rows are rows");
    assert_eq!(floe.metric("floe_late_rows_total"), Some(3.0));
    floe.terminate();
    floe.wait().expect_code(0);
}

/// Rows without windows, windows without rows: each table is optional, and the dead letters are always there.
#[test]
fn each_table_is_optional() {
    let _turn = turn();
    let broker = Broker::shared();
    let topic = "optional";
    let telemetry = Telemetry { messages: 1_000, ..Telemetry::default() };
    let truth = telemetry.truth();
    crate::support::check::fill(broker, topic, &telemetry);

    let mut rows_only = Pipeline::new(&broker.bootstrap, topic);
    rows_only.remove("windows").remove("event_time");
    rows_only.run();
    rows_are_true(&rows_only.tables(), &truth);

    let mut windows_only = Pipeline::new(&broker.bootstrap, topic);
    windows_only.remove("rows").set("source.max_offsets_per_trigger", 300);
    windows_only.run();
    windows_are(&windows_only.tables(), &truth.closed(DELAY_MS));
    let dead: u64 = windows_only.tables().value("select count(*) from {telemetry.dead_letters}");
    assert_eq!(dead, truth.dead_letters());
}

/// A filter takes rows out of both tables and off the dead letters; a derived column is a column.
#[test]
fn filter_and_derived_columns() {
    let _turn = turn();
    let broker = Broker::shared();
    let topic = "transform";
    let telemetry = Telemetry { messages: 1_000, ..Telemetry::default() };
    crate::support::check::fill(broker, topic, &telemetry);
    let mut pipeline = Pipeline::new(&broker.bootstrap, topic);
    pipeline.set("transform.filter", "duration_ms < 5000").set("transform.columns.battery_low", "battery_level < 20");
    pipeline.run();

    let mut truth = Truth::default();
    let mut low = 0;
    for index in 0..telemetry.messages {
        let reading = telemetry.reading(index);
        if reading.invalid.is_some() || reading.duration_ms < 5_000 {
            truth.add(&reading);
            low += u64::from(reading.invalid.is_none() && reading.battery < 80);
        }
    }
    let tables = pipeline.tables();
    rows_are_true(&tables, &truth);
    windows_are(&tables, &truth.closed(DELAY_MS));
    assert_eq!(tables.value::<u64>("select count(*) from {telemetry.events} where battery_low"), low);
}
