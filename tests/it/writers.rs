use std::time::{Duration, Instant};

use crate::support::broker::Broker;
use crate::support::catalogs::RestServer;
use crate::support::check::{DEAD_LETTERS, ROWS, WINDOWS, everything, fill};
use crate::support::floe::Pipeline;
use crate::support::proxy::{Fault, Proxy};
use crate::support::reader::Tables;
use crate::support::telemetry::Telemetry;
use crate::support::turn;

const FLOES: usize = 5;
const OTHERS: usize = 3;
const APPENDS: u64 = 12;

/// Eight writers share the rows table and that of the dead letters: five queries, each with a topic of its own, and three
/// PyIceberg processes.
#[test]
fn eight_writers_on_one_table() {
    let _turn = turn();
    let broker = Broker::shared();
    let server = RestServer::start();
    let telemetry = |i: usize| Telemetry { messages: 1_200, seed: 40 + i as u64, ..Telemetry::default() };
    let pipelines: Vec<Pipeline> = (0..FLOES)
        .map(|i| {
            let topic = format!("writer_{i}");
            fill(broker, &topic, &telemetry(i));
            let mut pipeline = Pipeline::new(&broker.bootstrap, &topic);
            pipeline.rest(&server.uri, &server.uri).set("name", topic.as_str());
            // PyIceberg writes to partitioned tables only with another package.
            pipeline.set("rows.partition_by", toml::value::Array::new());
            pipeline.set_window("table", format!("telemetry.minutes_{i}"));
            pipeline.set("source.max_offsets_per_trigger", if i == 0 { 10_000 } else { 200 });
            pipeline
        })
        .collect();
    // The first one makes the tables, and rows for the others to copy.
    pipelines[0].run();

    let tables = Tables::new(&server.uri);
    std::thread::scope(|scope| {
        let running: Vec<_> = pipelines[1..].iter().map(Pipeline::spawn).collect();
        let others: Vec<_> = (0..OTHERS)
            .map(|n| {
                let tables = &tables;
                scope.spawn(move || tables.append_copies(ROWS, &format!("other_{n}"), APPENDS))
            })
            .collect();
        for floe in running {
            floe.wait().expect_code(0);
        }
        for other in others {
            other.join().unwrap();
        }
    });
    pipelines[0].run();

    for (i, pipeline) in pipelines.iter().enumerate() {
        let truth = telemetry(i).truth();
        let of = &pipeline.topic;
        let rows: Vec<(u64, u64, i64)> = tables.query(&format!(
            "select count(*), count(distinct (_kafka_partition, _kafka_offset)), coalesce(sum(duration_ms), 0)::bigint \
             from {{telemetry.events}} where _kafka_topic = '{of}'"
        ));
        assert_eq!(rows, [(truth.valid, truth.valid, truth.duration_sum)], "rows of {of}");
        let letters: Vec<(u64, u64)> = tables.query(&format!(
            "select count(*), count(distinct (partition, \"offset\")) from {{telemetry.dead_letters}} where topic = '{of}'"
        ));
        assert_eq!(letters, [(truth.dead_letters(), truth.dead_letters())], "dead letters of {of}");
        let events: i64 = tables.value(&format!("select sum(events)::bigint from {{telemetry.minutes_{i}}}"));
        let closed = truth.closed(pipeline.delay_ms());
        assert_eq!(events, closed.values().map(|window| window.events).sum::<i64>(), "windows of {of}");
    }
    let others: Vec<(u64, u64)> = tables.query(
        "select count(*), count(distinct (_kafka_topic, _kafka_offset)) from {telemetry.events} \
         where _kafka_topic like 'other_%'",
    );
    let appended = OTHERS as u64 * APPENDS;
    assert_eq!(others, [(appended, appended)], "rows of the other writers");
    // `floe.` and the id of a query.
    let is_marker = |key: &String| key.strip_prefix("floe.").is_some_and(|id| uuid::Uuid::parse_str(id).is_ok());
    let markers = tables.table(ROWS).properties.into_keys().filter(is_marker).count();
    assert_eq!(markers, FLOES);
}

/// Whatever Floe tries for a minute, somebody has just been faster.
#[test]
fn a_writer_that_is_always_faster_for_a_minute() {
    let _turn = turn();
    let broker = Broker::shared();
    let telemetry = Telemetry { messages: 1_000, ..Telemetry::default() };
    let topic = "overtaken";
    fill(broker, topic, &telemetry);
    let server = RestServer::start();
    let competitor = Tables::new(&server.uri);
    let mut since = None;
    let mut commits = 0;
    let proxy = Proxy::start(&server.address, move |request| {
        if request.is_commit() && !request.body.contains("floe.probe") {
            commits += 1;
            // And at least thirty times, where a minute is not enough for that.
            if since.get_or_insert_with(Instant::now).elapsed() < Duration::from_secs(60) || commits <= 30 {
                competitor.touch([ROWS, WINDOWS, DEAD_LETTERS][commits % 3]);
            }
        }
        Fault::Pass
    });
    let mut pipeline = Pipeline::new(&broker.bootstrap, topic);
    pipeline.rest(&proxy.uri, &server.uri).set("source.max_offsets_per_trigger", 500);
    pipeline.run();
    let conflicts = proxy.seen().iter().filter(|(_, _, status)| *status == 409).count();
    assert!(conflicts >= 20, "{conflicts}");
    everything(&pipeline, broker, &telemetry);
}
