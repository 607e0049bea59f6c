use std::thread::sleep;
use std::time::{Duration, Instant};

use crate::support::broker::Broker;
use crate::support::check::{everything, fill, offsets_in_tables};
use crate::support::floe::Pipeline;
use crate::support::telemetry::Telemetry;
use crate::support::turn;

fn telemetry() -> Telemetry {
    Telemetry { messages: 3_000, ..Telemetry::default() }
}

#[test]
fn sigterm_commits_the_batch_in_hand() {
    let _turn = turn();
    let broker = Broker::shared();
    fill(broker, "sigterm", &telemetry());
    for (signal, in_hand) in [(libc::SIGTERM, 1), (libc::SIGINT, 2)] {
        let mut pipeline = Pipeline::new(&broker.bootstrap, "sigterm");
        pipeline.service("100 ms").set("source.max_offsets_per_trigger", 1_000);
        let mut floe = pipeline.spawn_with(&[("FLOE_FAILPOINT", &format!("execute.files_written:stop:{in_hand}"))]);
        floe.until_stopped();
        floe.signal(signal);
        floe.signal(libc::SIGCONT);
        floe.wait().expect_code(0);
        assert_eq!(offsets_in_tables(&pipeline.tables()), in_hand * 1_000, "the batch in hand, and no other");
        pipeline.remove("trigger").set("trigger.available_now", true);
        pipeline.run();
        everything(&pipeline, broker, &telemetry());
    }
}

#[test]
fn sigterm_between_two_batches() {
    let _turn = turn();
    let broker = Broker::shared();
    broker.create_topic("sigterm_idle", 1, &[]);
    let mut pipeline = Pipeline::new(&broker.bootstrap, "sigterm_idle");
    pipeline.service("1 hour");
    let mut floe = pipeline.spawn();
    floe.until_ready();
    floe.terminate();
    // Nobody waits for the hour to be over.
    floe.wait().expect_code(0);
}

/// A batch that cannot end, since the broker is frozen: neither a second SIGTERM nor the timeout waits for it.
#[test]
fn a_second_sigterm_and_the_timeout_do_not_wait() {
    let _turn = turn();
    let broker = Broker::start();
    fill(&broker, "hanging", &telemetry());
    for by_timeout in [false, true] {
        let mut pipeline = Pipeline::new(&broker.bootstrap, "hanging");
        pipeline.set("execution.shutdown_timeout", if by_timeout { "1 second" } else { "25 seconds" });
        let mut floe = pipeline.spawn_with(&[("FLOE_FAILPOINT", "plan.after_put:stop")]);
        floe.until_stopped();
        broker.pause();
        floe.signal(libc::SIGCONT);
        sleep(Duration::from_secs(1));
        floe.terminate();
        let from = Instant::now();
        if !by_timeout {
            // Two that arrive at once would be one.
            floe.until("it has heard the first one", |floe| floe.output().contains("second signal").then_some(()));
            floe.terminate();
        }
        let ended = floe.wait();
        assert_ne!(ended.code(), Some(0), "{}", ended.output);
        assert!(from.elapsed() < Duration::from_secs(20), "{:?}", from.elapsed());
        broker.resume();
        pipeline.run();
        everything(&pipeline, &broker, &telemetry());
    }
}
