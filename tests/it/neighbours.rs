use crate::support::broker::Broker;
use crate::support::check::{ROWS, fill, windows_are};
use crate::support::floe::Pipeline;
use crate::support::telemetry::Telemetry;
use crate::support::turn;

/// PyIceberg at work between two batches, and before a batch is tried again that was planned before.
#[test]
fn what_pyiceberg_does_to_a_table_is_kept() {
    let _turn = turn();
    let telemetry = Telemetry { messages: 5_000, ..Telemetry::default() };
    fill(Broker::shared(), "neighbours", &telemetry);
    for stopped_at in ["tidy", "plan.after_put", "execute.files_written"] {
        let mut pipeline = Pipeline::new(&Broker::shared().bootstrap, "neighbours");
        // PyIceberg alone cannot write to partitions by day.
        pipeline.set("source.max_offsets_per_trigger", 1_000).set("rows.partition_by", toml::Value::Array(Vec::new()));
        pipeline.run_failing(&format!("{stopped_at}:kill:3")).expect_killed();
        let tables = pipeline.tables();
        let deleted: u64 =
            tables.value("select count(*) from {telemetry.events} where _kafka_partition = 0 and _kafka_offset < 50");
        tables.delete(ROWS, "_kafka_partition == 0 and _kafka_offset < 50");
        let (branched, expired) = tables.neighbour(ROWS, 7);
        pipeline.run();

        let truth = telemetry.truth();
        let table = tables.table(ROWS);
        assert_eq!(table.rows, Some(truth.valid - deleted + 7), "{stopped_at}");
        assert!(deleted > 0);
        let of_neighbour: u64 =
            tables.value("select count(*) from {telemetry.events} where _kafka_topic = 'neighbour'");
        assert_eq!(of_neighbour, 7);
        let doubled: u64 = tables.value(
            "select count(*) from (select 1 from {telemetry.events} group by _kafka_topic, _kafka_partition, \
             _kafka_offset having count(*) > 1)",
        );
        assert_eq!(doubled, 0);
        windows_are(&tables, &truth.closed(pipeline.delay_ms()));
        let refs = tables.refs(ROWS);
        assert_eq!((refs["audit"], refs["kept"]), (branched, branched), "{refs:?}");
        assert_ne!(refs["main"], branched);
        assert!(table.snapshots.iter().all(|snapshot| snapshot.id != expired));
    }
}
