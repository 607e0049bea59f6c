use crate::support::broker::Broker;
use crate::support::check::{DELAY_MS, records};
use crate::support::floe::Pipeline;
use crate::support::telemetry::{MINUTE_MS, Telemetry, Truth};
use crate::support::turn;

/// What has to agree to the last bit.
const EXACT: [(&str, &str, &str); 27] = [
    ("events", "count(*)", "count(*)"),
    ("failing_events", "count(*) FILTER (WHERE failing)", "count(*) filter (where failing)"),
    ("statuses", "count(DISTINCT status)", "count(distinct status)"),
    ("durations", "count(DISTINCT duration_ms % 7)", "count(distinct duration_ms % 7)"),
    ("duration_sum", "sum(duration_ms)", "sum(duration_ms)"),
    ("duration_distinct_sum", "sum(DISTINCT duration_ms % 7)", "sum(distinct duration_ms % 7)"),
    (
        "quiet_sum",
        "sum(duration_ms) FILTER (WHERE duration_ms < 50)",
        "sum(duration_ms) filter (where duration_ms < 50)",
    ),
    ("battery_sum", "sum(battery_level)", "sum(battery_level)"),
    ("price_sum", "sum(price)", "sum(price)"),
    ("price_max", "max(price)", "max(price)"),
    ("battery_min", "min(battery_level)", "min(battery_level)"),
    ("battery_max", "max(battery_level)", "max(battery_level)"),
    ("status_min", "min(status)", "min(status)"),
    ("status_max", "max(status)", "max(status)"),
    ("earliest", "min(event_timestamp)", "min(event_timestamp)"),
    ("day_max", "max(day)", "max(day)"),
    ("failing_max", "max(failing)", "bool_or(failing)"),
    ("all_failing", "bool_and(failing)", "bool_and(failing)"),
    ("any_failing", "bool_or(failing)", "bool_or(failing)"),
    ("bits", "bit_xor(duration_ms)", "bit_xor(duration_ms)"),
    ("first_status", "first_value(status)", "first(status order by event_timestamp, _kafka_offset)"),
    ("last_status", "last_value(status)", "last(status order by event_timestamp, _kafka_offset)"),
    ("last_battery", "last_value(battery_level)", "last(battery_level order by event_timestamp, _kafka_offset)"),
    ("first_price", "first_value(price)", "first(price order by event_timestamp, _kafka_offset)"),
    (
        "first_failing",
        "first_value(event_timestamp) FILTER (WHERE failing)",
        "first(event_timestamp order by event_timestamp) filter (where failing)",
    ),
    ("spread", "max(duration_ms) - min(duration_ms)", "max(duration_ms) - min(duration_ms)"),
    (
        "verdict",
        "CASE WHEN count(*) FILTER (WHERE failing) * 5 > count(*) THEN 'bad' ELSE upper(min(status)) END",
        "case when count(*) filter (where failing) * 5 > count(*) then 'bad' else upper(min(status)) end",
    ),
];

/// What has to agree but for rounding.
const CLOSE: [(&str, &str, &str); 12] = [
    ("battery_avg", "avg(battery_level)", "avg(battery_level)"),
    ("duration_avg", "avg(duration_ms)", "avg(duration_ms)"),
    ("duration_distinct_avg", "avg(DISTINCT duration_ms % 7)", "avg(distinct duration_ms % 7)"),
    // decimal(14, 6), rounded half up
    ("price_avg", "avg(price)", "round(sum(price)::double / count(price), 6)"),
    ("latitude_var", "var(latitude)", "var_samp(latitude)"),
    ("latitude_var_pop", "var_pop(latitude)", "var_pop(latitude)"),
    ("latitude_stddev", "stddev(latitude)", "stddev_samp(latitude)"),
    ("latitude_stddev_pop", "stddev_pop(latitude)", "stddev_pop(latitude)"),
    ("p95", "approx_percentile_cont(duration_ms, 0.95)", "quantile_cont(duration_ms::double, 0.95)"),
    ("median", "approx_median(battery_level)", "quantile_cont(battery_level, 0.5)"),
    (
        "failing_percent",
        "100.0 * count(*) FILTER (WHERE failing) / count(*)",
        "100.0 * count(*) filter (where failing) / count(*)",
    ),
    (
        "share",
        "sum(battery_level) FILTER (WHERE failing) / nullif(count(*) FILTER (WHERE duration_ms < 5000), 0)",
        "sum(battery_level) filter (where failing) / nullif(count(*) filter (where duration_ms < 5000), 0)",
    ),
];

fn windows<'a>(aggregates: impl Iterator<Item = &'a (&'a str, &'a str, &'a str)>) -> toml::Value {
    let aggregates: Vec<String> = aggregates.map(|(name, sql, _)| format!("{name} = {sql:?}")).collect();
    let text = format!(
        "[[windows]]\ntable = \"telemetry.initials\"\nsize = \"5 minutes\"\n\
         group_by = [\"device_id\", \"upper(substr(status, 1, 1)) as initial\"]\n[windows.aggregates]\n{}\n\
         about = \"approx_distinct(duration_ms)\"",
        aggregates.join("\n")
    );
    text.parse::<toml::Table>().unwrap().remove("windows").unwrap()
}

/// Every aggregate, over batches, restarts and a change of the order and of expressions, equals what DuckDB makes of the rows.
#[test]
fn equal_what_another_engine_computes_from_the_rows() {
    let _turn = turn();
    let broker = Broker::shared();
    let topic = "aggregates";
    let telemetry = Telemetry { messages: 4_000, devices: 12, partitions: 3, ..Telemetry::default() };
    broker.create_topic(topic, telemetry.partitions, &[]);
    let mut pipeline = Pipeline::new(&broker.bootstrap, topic);
    pipeline
        .set("transform.columns.price", "cast(battery_level as decimal(10, 2))")
        .set("transform.columns.failing", "status = 'error'")
        .set("transform.columns.day", "cast(event_timestamp as date)")
        .set("source.max_offsets_per_trigger", 450)
        .set("windows", windows(EXACT.iter().chain(&CLOSE)));
    for slice in 0..4 {
        broker.produce_records(topic, records(&telemetry, slice * 1_000..(slice + 1) * 1_000));
        pipeline.run();
        if slice == 1 {
            let mut other: Vec<(&str, &str, &str)> = CLOSE.iter().chain(&EXACT).copied().collect();
            let percent = other.iter_mut().find(|(name, ..)| *name == "failing_percent").unwrap();
            percent.1 = "count(*) FILTER (WHERE failing) / (0.01 * count(*))";
            pipeline.set("windows", windows(other.iter()));
        }
    }

    let mut truth = Truth::default();
    (0..telemetry.messages).for_each(|index| truth.add(&telemetry.reading(index)));
    let watermark_ms = (truth.max_event_ms - DELAY_MS) / (5 * MINUTE_MS) * (5 * MINUTE_MS);
    let columns: Vec<String> = EXACT.iter().chain(&CLOSE).map(|(name, _, sql)| format!("{sql} as {name}")).collect();
    let from = format!(
        "from (select time_bucket(interval '5 minutes', event_timestamp) as window_start, device_id, \
           upper(substr(status, 1, 1)) as initial, count(distinct duration_ms) as about, {} \
         from {{telemetry.events}} where event_timestamp < make_timestamptz({watermark_ms}000) group by all) e \
         full join {{telemetry.initials}} w using (window_start, device_id, initial)",
        columns.join(", ")
    );
    let tables = pipeline.tables();
    let groups: (u64, u64, u64) =
        tables.query(&format!("select count(*), count(e.events), count(w.events) {from}")).remove(0);
    assert!(groups.0 > 200 && groups.0 == groups.1 && groups.0 == groups.2, "{groups:?}");
    let exact = EXACT.iter().map(|(name, ..)| format!("count(*) filter (where w.{name} is distinct from e.{name})"));
    let close = CLOSE.iter().map(|(name, ..)| {
        format!(
            "count(*) filter (where (w.{name} is null) <> (e.{name} is null) \
             or abs(w.{name} - e.{name}) > 1e-9 * (1 + abs(e.{name})))"
        )
    });
    let about = "count(*) filter (where abs(w.about - e.about) > 1 + 0.03 * e.about)".to_string();
    let checks: Vec<String> = exact.chain(close).chain([about]).collect();
    let wrong: Vec<u64> = tables.query::<Vec<u64>>(&format!("select {} {from}", checks.join(", "))).remove(0);
    let names = EXACT.iter().chain(&CLOSE).map(|(name, ..)| *name).chain(["about"]);
    let wrong: Vec<(&str, u64)> = names.zip(wrong).filter(|(_, groups)| *groups > 0).collect();
    assert!(wrong.is_empty(), "groups that differ: {wrong:?}");
    assert_eq!(tables.value::<String>("select typeof(price_avg) from {telemetry.initials} limit 1"), "DECIMAL(14,6)");
}

/// What cannot be computed for a group is null there, and leaves a dead letter.
#[test]
fn an_expression_that_fails_is_null_and_leaves_a_dead_letter() {
    let _turn = turn();
    let broker = Broker::shared();
    let topic = "aggregates-fail";
    let telemetry = Telemetry { messages: 1_000, invalid_per_mille: 0, ..Telemetry::default() };
    crate::support::check::fill(broker, topic, &telemetry);
    let mut pipeline = Pipeline::new(&broker.bootstrap, topic);
    let fails = ("ratio", "sum(duration_ms) / count(*) FILTER (WHERE status = 'error')", "");
    pipeline.set("windows", windows([fails].iter()));
    pipeline.run();
    let tables = pipeline.tables();
    let (null, other): (u64, u64) =
        tables.query("select count(*) filter (where ratio is null), count(ratio) from {telemetry.initials}").remove(0);
    assert!(null > 10 && other > 10, "{null} {other}");
    let dead: Vec<(String,)> = tables.query("select distinct reason from {telemetry.dead_letters}");
    assert_eq!(dead, [("overflow".to_string(),)]);
}

/// What cannot work on a stream is refused before anything runs, with the reason.
#[test]
fn that_cannot_work_on_a_stream_are_refused_by_check() {
    let mut pipeline = Pipeline::new("localhost:1", "none");
    let wrong = [
        ("a", "median(duration_ms)", ""),
        ("b", "sum(duration_ms) OVER ()", ""),
        ("c", "max(now())", ""),
        ("d", "array_agg(status)", ""),
        ("e", "max(sum(duration_ms))", ""),
        ("f", "sum(duration_ms) + latitude", ""),
    ];
    pipeline.set("windows", windows(wrong.iter()));
    pipeline.check().expect_code(2).expect_output(&[
        "windows.0.aggregates.a",
        "use approx_median(x)",
        "OVER (...) cannot run on a stream",
        "now() gives another result when it runs again",
        "its state has no bound",
        "an aggregate cannot stand inside another",
        "column latitude is neither inside an aggregate nor a group key",
    ]);
}
