use crate::support::broker::Broker;
use crate::support::check::{each_offset_once, everything, produced, records, rows_are_true, until_in_tables};
use crate::support::floe::Pipeline;
use crate::support::telemetry::Telemetry;
use crate::support::turn;

/// One partition, so that offset i is message i.
fn telemetry() -> Telemetry {
    Telemetry { messages: 1_000, partitions: 1, ..Telemetry::default() }
}

fn gaps(pipeline: &Pipeline) -> Vec<(String, i32, i64, i64)> {
    pipeline.tables().query(
        "select topic, partition, \"offset\", end_offset from {telemetry.dead_letters} where reason = 'data_loss' order by all",
    )
}

/// Offsets `[200, 500)` have expired: refused with the exact gap, or stepped over with a gap row.
fn expired(topic: &str, running: bool) {
    let _turn = turn();
    let broker = Broker::shared();
    let telemetry = telemetry();
    for fail in [true, false] {
        let topic = format!("{topic}.{fail}");
        broker.create_topic(&topic, 1, &[]);
        broker.produce_records(&topic, records(&telemetry, 0..200));
        let mut pipeline = Pipeline::new(&broker.bootstrap, &topic);
        pipeline.set("source.fail_on_data_loss", fail);
        let tables = pipeline.tables();
        let expire = || {
            broker.produce_records(&topic, records(&telemetry, 200..1_000));
            broker.delete_records(&topic, 0, 500);
        };
        let ended = if running {
            pipeline.service("100 ms");
            let mut floe = pipeline.spawn();
            until_in_tables(&mut floe, &tables, 200);
            floe.signal(libc::SIGSTOP);
            floe.until_stopped();
            expire();
            floe.signal(libc::SIGCONT);
            if !fail {
                until_in_tables(&mut floe, &tables, 700);
                floe.terminate();
            }
            floe.wait()
        } else {
            pipeline.run();
            expire();
            pipeline.spawn().wait()
        };
        let mut there = produced(broker, &topic, 1);
        assert_eq!(there.first(), Some(&(0, 500)));
        if fail {
            ended.expect_code(3).expect_output(&[&topic, "200", "500", "fail_on_data_loss"]);
            assert_eq!(gaps(&pipeline), []);
            there.clear();
        } else {
            ended.expect_code(0);
            assert_eq!(gaps(&pipeline), [(topic.clone(), 0, 200, 500)]);
        }
        there.extend((0..200).map(|offset| (0, offset)));
        each_offset_once(&tables, &topic, &there);
    }
}

#[test]
fn expired_under_a_stopped_query() {
    expired("expired_stopped", false);
}

#[test]
fn expired_under_a_running_query() {
    expired("expired_running", true);
}

/// Expired between the plan and its execution: the plan is a promise too.
#[test]
fn expired_under_a_planned_batch() {
    let _turn = turn();
    let broker = Broker::shared();
    for fail in [true, false] {
        let topic = format!("expired_planned.{fail}");
        broker.create_topic(&topic, 1, &[]);
        broker.produce_records(&topic, records(&telemetry(), 0..1_000));
        let mut pipeline = Pipeline::new(&broker.bootstrap, &topic);
        pipeline.set("source.fail_on_data_loss", fail);
        pipeline.run_failing("plan.after_put:kill").expect_killed();
        broker.delete_records(&topic, 0, 300);
        let ended = pipeline.spawn().wait();
        if fail {
            ended.expect_code(3).expect_output(&[&topic, "300", "fail_on_data_loss"]);
            continue;
        }
        ended.expect_code(0);
        assert_eq!(gaps(&pipeline), [(topic.clone(), 0, 0, 300)]);
        each_offset_once(&pipeline.tables(), &topic, &produced(broker, &topic, 1));
    }
}

/// Its offsets start again at 0: going on would mix two streams.
#[test]
fn a_topic_deleted_and_recreated_is_refused() {
    let _turn = turn();
    let broker = Broker::shared();
    for running in [false, true] {
        let topic = format!("recreated_topic.{running}");
        broker.create_topic(&topic, 1, &[]);
        broker.produce_records(&topic, records(&telemetry(), 0..300));
        let before = produced(broker, &topic, 1);
        let mut pipeline = Pipeline::new(&broker.bootstrap, &topic);
        let again = || {
            broker.delete_topic(&topic);
            broker.create_topic(&topic, 1, &[]);
            // More than before, so that no offset is out of range.
            broker.produce_records(&topic, records(&telemetry(), 300..1_000));
        };
        let ended = if running {
            pipeline.service("100 ms");
            let mut floe = pipeline.spawn();
            until_in_tables(&mut floe, &pipeline.tables(), 300);
            floe.signal(libc::SIGSTOP);
            floe.until_stopped();
            again();
            floe.signal(libc::SIGCONT);
            floe.wait()
        } else {
            pipeline.run();
            again();
            pipeline.spawn().wait()
        };
        ended.expect_code(3).expect_output(&[&topic, "created"]);
        each_offset_once(&pipeline.tables(), &topic, &before);
    }
}

/// They are read from their first offset, whatever `starting_offsets` says.
#[test]
fn added_partitions_are_read_from_their_beginning() {
    let _turn = turn();
    let broker = Broker::shared();
    let topic = "added_partitions";
    let wide = Telemetry { messages: 2_000, partitions: 4, ..Telemetry::default() };
    broker.create_topic(topic, 1, &[]);
    let mut all = records(&wide, 0..2_000);
    let place = |records: &mut [crate::support::broker::Rec], partitions: i32| {
        for (index, record) in records.iter_mut().enumerate() {
            record.partition = Some(index as i32 % partitions);
        }
        records.to_vec()
    };
    broker.produce_records(topic, place(&mut all[..500], 1));
    let mut pipeline = Pipeline::new(&broker.bootstrap, topic);
    pipeline.service("100 ms").kafka("topic.metadata.refresh.interval.ms", "500");
    let tables = pipeline.tables();
    let mut floe = pipeline.spawn();
    until_in_tables(&mut floe, &tables, 500);
    // Under a running query, with records that are there before the query notices.
    broker.add_partitions(topic, 3);
    broker.produce_records(topic, place(&mut all[500..1_200], 3));
    until_in_tables(&mut floe, &tables, 1_200);
    floe.terminate();
    floe.wait().expect_code(0);
    // Under a stopped one.
    broker.add_partitions(topic, 4);
    broker.produce_records(topic, place(&mut all[1_200..], 4));
    pipeline.remove("trigger").set("trigger.available_now", true);
    pipeline.run();
    everything(&pipeline, broker, &wide);
}

/// `starting_offsets` in all its forms decides the first batch, and no other.
#[test]
fn starting_offsets() {
    let _turn = turn();
    let broker = Broker::shared();
    let topic = "starting";
    let telemetry = telemetry();
    broker.create_topic(topic, 1, &[("retention.ms", "-1")]);
    let mut all = records(&telemetry, 0..1_000);
    for (index, record) in all.iter_mut().enumerate() {
        record.timestamp_ms = Some(1_700_000_000_000 + index as i64);
    }
    broker.produce_records(topic, all[..800].to_vec());
    let explicit: toml::Table = format!("[{topic}]\n0 = 300").parse().unwrap();
    let cases: [(toml::Value, i64); 4] = [
        ("earliest".into(), 0),
        ("latest".into(), 800),
        // Of record 500.
        ("2023-11-14T22:13:20.500Z".into(), 500),
        (explicit.into(), 300),
    ];
    let mut pipelines = Vec::new();
    for (value, first) in cases {
        let mut pipeline = Pipeline::new(&broker.bootstrap, topic);
        pipeline.set("source.starting_offsets", value);
        pipeline.run();
        pipelines.push((pipeline, first));
    }
    broker.produce_records(topic, all[800..].to_vec());
    for (pipeline, first) in pipelines {
        pipeline.run();
        let expected = (first..1_000).map(|offset| (0, offset)).collect();
        each_offset_once(&pipeline.tables(), topic, &expected);
        if first == 0 {
            rows_are_true(&pipeline.tables(), &telemetry.truth());
        }
    }
}
