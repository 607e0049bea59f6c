use std::collections::BTreeMap;

use crate::support::broker::{Broker, Rec};
use crate::support::check::{
    DELAY_MS, everything, latest_windows, offsets_in_tables, records, rows_are_true, same_windows, until_in_tables,
    windows, windows_are,
};
use crate::support::floe::Pipeline;
use crate::support::reader::Tables;
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

/// Events and sum of durations, by start of the window in milliseconds, and device.
type Sums = BTreeMap<(i64, String), (i64, i64)>;

fn add(sums: &mut Sums, start_ms: i64, device: String, duration_ms: i64) {
    let (events, duration) = sums.entry((start_ms, device)).or_default();
    *events += 1;
    *duration += duration_ms;
}

fn sums(tables: &Tables, sql: &str) -> Sums {
    let rows: Vec<(i64, String, i64, i64)> = tables.query(sql);
    let sums: Sums =
        rows.iter().map(|(start, device, events, sum)| ((*start, device.clone()), (*events, *sum))).collect();
    assert_eq!(sums.len(), rows.len(), "a window is there twice");
    sums
}

fn window_sums(tables: &Tables) -> Sums {
    sums(tables, "select epoch_ms(window_start), device_id, events, duration_sum from {telemetry.device_minutes}")
}

/// The starts of all windows of five minutes, every two minutes from 30 seconds past, that hold a time.
fn sliding_starts(event_ms: i64) -> Vec<i64> {
    let last = event_ms - (event_ms - 30_000).rem_euclid(2 * MINUTE_MS);
    (0..3).map(|i| last - i * 2 * MINUTE_MS).filter(|start| event_ms < start + 5 * MINUTE_MS).collect()
}

fn slide(pipeline: &mut Pipeline) {
    pipeline.set_window("size", "5 minutes").set_window("slide", "2 minutes").set_window("start", "30 seconds");
}

/// Overlapping windows that do not begin with the hour, in many batches, with a restart after each slice.
#[test]
fn that_slide_hold_every_row_as_often_as_they_overlap() {
    let _turn = turn();
    let broker = Broker::shared();
    let topic = "sliding";
    let telemetry =
        Telemetry { messages: 3_000, devices: 7, disorder_ms: DELAY_MS - 1, partitions: 3, ..Telemetry::default() };
    broker.create_topic(topic, telemetry.partitions, &[]);
    let mut pipeline = Pipeline::new(&broker.bootstrap, topic);
    slide(&mut pipeline);
    pipeline.set("source.max_offsets_per_trigger", 400);
    for slice in 0..3 {
        broker.produce_records(topic, records(&telemetry, slice * 1_000..(slice + 1) * 1_000));
        pipeline.run();
    }
    let watermark = telemetry.truth().max_event_ms - DELAY_MS;
    let mut expected = Sums::new();
    for reading in (0..telemetry.messages).map(|i| telemetry.reading(i)).filter(|r| r.invalid.is_none()) {
        for start in sliding_starts(reading.event_ms).into_iter().filter(|s| s + 5 * MINUTE_MS <= watermark) {
            add(&mut expected, start, reading.device_id(), reading.duration_ms);
        }
    }
    let tables = pipeline.tables();
    assert_eq!(window_sums(&tables), expected);
    let size: Vec<(i64,)> =
        tables.query("select distinct epoch_ms(window_end - window_start) from {telemetry.device_minutes}");
    assert_eq!(size, [(5 * MINUTE_MS,)]);
    rows_are_true(&tables, &telemetry.truth());
}

/// A day of a time zone is as long as its clocks say: 23 hours in spring, 25 in autumn. A second window table of the same rows.
#[test]
fn of_days_follow_the_clocks_of_a_time_zone() {
    const HOUR: i64 = 60 * MINUTE_MS;
    // 2026-03-27T23:00:00Z and 2026-10-23T22:00:00Z: midnight in Berlin, a day before each change
    let (spring, autumn) = (1_774_652_400_000, 1_792_792_800_000);
    let _turn = turn();
    let broker = Broker::shared();
    let topic = "berlin";
    broker.create_topic(topic, 1, &[]);
    let mut pipeline = Pipeline::new(&broker.bootstrap, topic);
    pipeline.add_window(
        r#"
        table = "telemetry.daily"
        size = "1 day"
        time_zone = "Europe/Berlin"
        aggregates = { events = "count(*)", last = "max(event_timestamp)" }
        "#,
    );
    // two readings an hour, one of them at the very start
    let readings =
        |from: i64, hours: i64| (0..2 * hours).map(move |half| reading(1, from + half * HOUR / 2)).collect::<Vec<_>>();
    broker.produce_records(topic, readings(spring, 3 * 24));
    pipeline.run();
    broker.produce_records(topic, readings(autumn, 4 * 24));
    pipeline.run();
    let tables = pipeline.tables();
    let rows: Vec<(i64, i64, i64)> = tables.query(
        "select epoch_ms(window_start), epoch_ms(window_end) - epoch_ms(window_start), events from {telemetry.daily} \
         order by window_start",
    );
    let mut expected = Vec::new();
    for (first, days) in [(spring, [24, 23, 24]), (autumn, [24, 25, 24])] {
        let mut start = first;
        for hours in days {
            expected.push((start, hours * HOUR, 2 * hours));
            start += hours * HOUR;
        }
    }
    // what is left of the three days of 24 hours in spring
    expected.insert(3, (spring + 71 * HOUR, 24 * HOUR, 2));
    assert_eq!(rows, expected);
}

/// Every row is in its windows or in the table of late rows, once for each window that was closed before it came, whatever the
/// batches were and wherever the process was killed.
#[test]
fn late_rows_are_kept_with_the_window_that_they_missed() {
    let _turn = turn();
    let broker = Broker::shared();
    let topic = "late-table";
    let telemetry =
        Telemetry { messages: 4_000, devices: 5, disorder_ms: 4 * DELAY_MS, partitions: 2, ..Telemetry::default() };
    crate::support::check::fill(broker, topic, &telemetry);
    let mut pipeline = Pipeline::new(&broker.bootstrap, topic);
    slide(&mut pipeline);
    pipeline.set_window("late", "table").set("source.max_offsets_per_trigger", 300);
    pipeline.run_failing("execute.files_written:kill:4").expect_killed();
    pipeline.run_failing("tidy:kill:5").expect_killed();
    pipeline.run();

    let mut expected = Sums::new();
    for reading in (0..telemetry.messages).map(|i| telemetry.reading(i)).filter(|r| r.invalid.is_none()) {
        for start in sliding_starts(reading.event_ms) {
            add(&mut expected, start, reading.device_id(), reading.duration_ms);
        }
    }
    let tables = pipeline.tables();
    let watermark = telemetry.truth().max_event_ms - DELAY_MS;
    let late = sums(
        &tables,
        "select epoch_ms(window_start), device_id, count(*), sum(duration_ms)::bigint \
         from {telemetry.device_minutes_late} group by all",
    );
    let mut found = window_sums(&tables);
    for (window, (events, duration)) in &late {
        let (in_time, sum) = found.entry(window.clone()).or_default();
        (*in_time, *sum) = (*in_time + events, *sum + duration);
    }
    expected.retain(|(start, _), _| start + 5 * MINUTE_MS <= watermark);
    assert_eq!(found, expected, "what the windows have and what they missed");

    let late_rows: i64 = late.values().map(|(events, _)| events).sum();
    assert!(late_rows > 300, "only {late_rows} rows were late");
    assert_eq!(late_counted(&pipeline), late_rows, "as many as are counted");
    // each says which window it missed and is a row like all others
    let strange: Vec<(u64,)> = tables.query(
        "select count(*) from {telemetry.device_minutes_late} late \
         left join {telemetry.events} events using (_kafka_partition, _kafka_offset, _kafka_topic, event_timestamp, device_id) \
         where events.duration_ms is null or late.duration_ms <> events.duration_ms \
         or window_table <> 'telemetry.device_minutes' or window_end > watermark \
         or event_timestamp < window_start or event_timestamp >= window_end",
    );
    assert_eq!(strange, [(0,)]);
    let partly: u64 = tables.value(
        "select count(*) from (select _kafka_offset, count(*) missed from {telemetry.device_minutes_late} \
         group by _kafka_partition, _kafka_offset) where missed = 1",
    );
    assert!(partly > 0, "no row was late for some of its windows only");
    rows_are_true(&tables, &telemetry.truth());
}

/// The late rows that the batches' commits account for.
fn late_counted(pipeline: &Pipeline) -> i64 {
    let commits = std::fs::read_dir(pipeline.checkpoint().join("commits")).expect("commits");
    let count = |file: std::fs::DirEntry| {
        let text = std::fs::read_to_string(file.path()).expect("commit");
        let entry = text.lines().find_map(|line| serde_json::from_str::<serde_json::Value>(line).ok()).expect("JSON");
        let late = entry.pointer("/counts/late").and_then(|l| l.as_object()).expect("late").clone();
        late.values().filter_map(serde_json::Value::as_i64).sum::<i64>()
    };
    commits.map(|file| count(file.expect("commit"))).sum()
}

/// A filter of one window table is not one of the others, of the rows, or of the watermark.
#[test]
fn a_filter_is_about_its_windows_alone() {
    let _turn = turn();
    let broker = Broker::shared();
    let topic = "window-filter";
    let telemetry = Telemetry { messages: 2_000, partitions: 1, devices: 9, ..Telemetry::default() };
    crate::support::check::fill(broker, topic, &telemetry);
    let mut pipeline = Pipeline::new(&broker.bootstrap, topic);
    pipeline.set("source.max_offsets_per_trigger", 300).add_window(
        r#"
        table = "telemetry.errors"
        size = "1 minute"
        filter = "status = 'error' AND duration_ms < 9000"
        group_by = ["device_id"]
        aggregates = { events = "count(*)", duration_sum = "sum(duration_ms)" }
        "#,
    );
    pipeline.run();
    let truth = telemetry.truth();
    let mut expected = Sums::new();
    for reading in (0..telemetry.messages).map(|i| telemetry.reading(i)).filter(|r| r.invalid.is_none()) {
        let start = reading.event_ms.div_euclid(MINUTE_MS) * MINUTE_MS;
        if reading.status_name() == "error"
            && reading.duration_ms < 9_000
            && start + MINUTE_MS <= truth.max_event_ms - DELAY_MS
        {
            add(&mut expected, start, reading.device_id(), reading.duration_ms);
        }
    }
    let tables = pipeline.tables();
    let found = sums(&tables, "select epoch_ms(window_start), device_id, events, duration_sum from {telemetry.errors}");
    assert_eq!(found, expected);
    windows_are(&tables, &truth.closed(DELAY_MS));
    rows_are_true(&tables, &truth);
}

/// Early results: the newest revision of every group is what all rows so far come to, for windows that are open as for those
/// that are closed, whatever was killed and whether or not windows fit into memory.
#[test]
fn in_update_mode_the_newest_revisions_are_the_truth_so_far() {
    let _turn = turn();
    let broker = Broker::shared();
    for budget in ["1 GiB", "0 B"] {
        let topic = &format!("update-{}", budget.len());
        let telemetry =
            Telemetry { messages: 3_000, devices: 7, disorder_ms: DELAY_MS - 1, partitions: 3, ..Telemetry::default() };
        broker.create_topic(topic, telemetry.partitions, &[]);
        let mut pipeline = Pipeline::new(&broker.bootstrap, topic);
        pipeline.set_window("output_mode", "update").set("state.memory_budget", budget);
        pipeline.set("source.max_offsets_per_trigger", 400);
        let mut truth = Truth::default();
        let tables = pipeline.tables();
        let points = ["commit_log.before_put:kill:2", "execute.files_written:kill:2", "commit_log.after_put:kill:2"];
        for (slice, point) in (0..).zip(points) {
            let range = slice * 1_000..(slice + 1) * 1_000;
            broker.produce_records(topic, records(&telemetry, range.clone()));
            range.for_each(|index| truth.add(&telemetry.reading(index)));
            pipeline.run_failing(point).expect_killed();
            pipeline.run();
            same_windows(&latest_windows(&tables), &truth.windows);
        }
        // Each batch has written a group once at most.
        let sql = "select count(*) from (select 1 from {telemetry.device_minutes} group by window_start, device_id, \
                   revision having count(*) > 1)";
        assert_eq!(tables.query::<(i64,)>(sql), [(0,)]);
        let revisions: Vec<(i64, i64)> =
            tables.query("select count(*), count(distinct revision) from {telemetry.device_minutes}");
        assert!(revisions[0].0 > truth.windows.len() as i64 && revisions[0].1 >= 8, "{revisions:?}");
    }
}

/// Sessions by definition: start and end in milliseconds, device, rows, sum of durations.
fn naive_sessions(telemetry: &Telemetry, gap_ms: i64) -> Vec<(i64, i64, String, i64, i64)> {
    let mut readings: Vec<(String, i64, i64)> = (0..telemetry.messages)
        .map(|i| telemetry.reading(i))
        .filter(|r| r.invalid.is_none())
        .map(|r| (r.device_id(), r.event_ms, r.duration_ms))
        .collect();
    readings.sort();
    let mut sessions: Vec<(i64, i64, String, i64, i64)> = Vec::new();
    for (device, at_ms, duration_ms) in readings {
        match sessions.last_mut().filter(|s| s.2 == device && at_ms <= s.1) {
            Some(session) => {
                (session.1, session.3, session.4) = (at_ms + gap_ms, session.3 + 1, session.4 + duration_ms);
            }
            None => sessions.push((at_ms, at_ms + gap_ms, device, 1, duration_ms)),
        }
    }
    sessions.sort();
    sessions
}

/// Sessions in many batches with disorder, killed on the way, in memory and in files only: as if read at once.
#[test]
fn sessions_are_the_same_however_often_the_process_dies() {
    let _turn = turn();
    let broker = Broker::shared();
    for budget in ["1 GiB", "0 B"] {
        let topic = &format!("sessions-{}", budget.len());
        let telemetry = Telemetry {
            messages: 3_000,
            devices: 40,
            disorder_ms: DELAY_MS - 1,
            partitions: 3,
            ..Telemetry::default()
        };
        broker.create_topic(topic, telemetry.partitions, &[]);
        let mut pipeline = Pipeline::new(&broker.bootstrap, topic);
        let span_ms = (0..telemetry.messages).map(|i| telemetry.reading(i).event_ms).max().unwrap() - START_MS;
        let gap_ms = (span_ms * telemetry.devices as i64 / telemetry.messages as i64).max(1);
        let text = format!(
            "table = \"telemetry.sessions\"\nsession_gap = \"{gap_ms} ms\"\ngroup_by = [\"device_id\"]\n\
             [aggregates]\nevents = \"count(*)\"\nduration_sum = \"sum(duration_ms)\""
        );
        pipeline.add_window(&text).set("source.max_offsets_per_trigger", 200).set("state.memory_budget", budget);
        let points = ["commit_log.before_put:kill:2", "execute.files_written:kill:3", "commit_log.after_put:kill:2"];
        for (slice, point) in (0..).zip(points) {
            broker.produce_records(topic, records(&telemetry, slice * 1_000..(slice + 1) * 1_000));
            pipeline.run_failing(point).expect_killed();
            pipeline.run();
        }
        let found: Vec<(i64, i64, String, i64, i64)> = pipeline.tables().query(
            "select epoch_ms(window_start), epoch_ms(window_end), device_id, events, duration_sum \
             from {telemetry.sessions} order by all",
        );
        let watermark_ms = telemetry.truth().max_event_ms - DELAY_MS;
        let (expected, open): (Vec<_>, Vec<_>) =
            naive_sessions(&telemetry, gap_ms).into_iter().partition(|s| s.1 <= watermark_ms);
        assert!(expected.len() > 100 && expected.iter().any(|s| s.3 > 2), "{} sessions", expected.len());
        assert_eq!(found, expected);
        everything(&pipeline, broker, &telemetry);
        // What closes next is read from the files.
        let next = open.iter().map(|s| (s.1, s.0)).min().map(|(end_ms, start_ms)| [start_ms, end_ms]);
        let told = pipeline.watermark();
        let told =
            told["next_windows"].as_array().unwrap().iter().find(|w| w["table"] == "telemetry.sessions").unwrap();
        let time = |name: &str| told[name].as_str().unwrap().parse::<jiff::Timestamp>().unwrap().as_millisecond();
        assert_eq!(Some([time("window_start"), time("window_end")]), next, "{told}");
    }
}
