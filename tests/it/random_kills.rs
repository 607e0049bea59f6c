use std::time::Duration;

use crate::support::broker::Broker;
use crate::support::check::{everything, records};
use crate::support::floe::Pipeline;
use crate::support::telemetry::Telemetry;
use crate::support::turn;

/// Messages arrive, Floe runs, and after some random time it is gone; at the end it is as if nothing had happened.
#[test]
fn at_random_moments() {
    let _turn = turn();
    let number = |name: &str| std::env::var(name).ok().map(|v| v.parse::<u64>().expect("a number"));
    let kills = number("FLOE_TEST_KILLS").unwrap_or(20);
    let now = std::time::SystemTime::now().duration_since(std::time::UNIX_EPOCH).unwrap();
    let seed = number("FLOE_TEST_SEED").unwrap_or(u64::from(now.subsec_nanos()));
    eprintln!("FLOE_TEST_SEED={seed}");

    let broker = Broker::shared();
    let telemetry = Telemetry { seed, messages: kills * 400, ..Telemetry::default() };
    broker.create_topic("random_kills", telemetry.partitions, &[]);
    let mut pipeline = Pipeline::new(&broker.bootstrap, "random_kills");
    pipeline.set("source.max_offsets_per_trigger", 150).service("50 ms");
    let mut random = seed;
    for kill in 0..kills {
        broker.produce_records("random_kills", records(&telemetry, kill * 400..(kill + 1) * 400));
        random = random.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
        let mut floe = pipeline.spawn();
        // Half of them as it starts, half of them as it runs.
        if random >> 63 == 1 {
            floe.until("the status page is served", |floe| floe.get("/healthz"));
        }
        std::thread::sleep(Duration::from_millis((random >> 33) % 1_200));
        floe.kill();
    }
    pipeline.remove("trigger").set("trigger.available_now", true);
    pipeline.set("source.max_offsets_per_trigger", 100_000);
    pipeline.run();
    everything(&pipeline, broker, &telemetry);
}
