use crate::support::broker::Broker;
use crate::support::catalogs::RestServer;
use crate::support::check::{DEAD_LETTERS, ROWS, WINDOWS, everything, fill, offsets_in_tables};
use crate::support::floe::Pipeline;
use crate::support::proxy::{Fault, Proxy, Request};
use crate::support::s3::{KEY, S3};
use crate::support::telemetry::Telemetry;
use crate::support::tls::Tls;
use crate::support::turn;

/// Three batches, and one without data that closes the last windows.
fn pipeline(s3: &S3, topic: &str) -> Pipeline {
    let mut pipeline = Pipeline::new(&Broker::shared().bootstrap, topic);
    pipeline.on_s3(s3, &s3.uri()).set("source.max_offsets_per_trigger", 700);
    pipeline
}

fn telemetry() -> Telemetry {
    Telemetry { messages: 2_000, ..Telemetry::default() }
}

#[test]
fn checkpoint_and_tables_on_s3_are_as_good_as_on_disk() {
    let _turn = turn();
    let broker = Broker::shared();
    let topic = "on_s3";
    fill(broker, topic, &telemetry());
    let s3 = S3::start();
    let pipeline = pipeline(&s3, topic);
    for step in
        ["plan.after_put", "execute.files_written", "state.after_put", "commit.committed", "commit_log.after_put"]
    {
        pipeline.run_failing(&format!("{step}:kill")).expect_killed();
    }
    pipeline.run();
    everything(&pipeline, broker, &telemetry());
    for table in [ROWS, WINDOWS, DEAD_LETTERS] {
        let table = pipeline.tables().table(table);
        assert!(table.metadata_location.starts_with("s3://bucket/warehouse/"), "{}", table.metadata_location);
        assert!(table.rows.is_some_and(|rows| rows > 0), "PyIceberg reads it too");
    }
    assert!(!pipeline.checkpoint().exists());
    pipeline.check().expect_code(0).expect_output(&["create-if-absent holds"]);
}

/// The fourth of the combinations of catalogs and stores; the others are in this file, in `rest` and in `exactly_once`.
#[test]
fn a_rest_catalog_whose_tables_are_on_s3() {
    let _turn = turn();
    let broker = Broker::shared();
    let topic = "rest_on_s3";
    fill(broker, topic, &telemetry());
    let s3 = S3::start();
    let server = RestServer::start_on_s3(&s3.uri(), "bucket", KEY);
    let proxy = Proxy::start(&s3.address, lossy(|_| true));
    let mut pipeline = Pipeline::new(&broker.bootstrap, topic);
    pipeline.rest(&server.uri, &server.uri).on_s3(&s3, &proxy.uri).set("source.max_offsets_per_trigger", 700);
    for step in ["execute.files_written", "commit.metadata_written", "commit.committed", "commit_log.after_put"] {
        pipeline.run_failing(&format!("{step}:kill")).expect_killed();
    }
    pipeline.run();
    everything(&pipeline, broker, &telemetry());
    for table in [ROWS, WINDOWS, DEAD_LETTERS] {
        let table = pipeline.tables().table(table);
        assert!(table.metadata_location.starts_with("s3://bucket/rest/"), "{}", table.metadata_location);
        assert!(table.rows.is_some_and(|rows| rows > 0), "PyIceberg reads it too");
    }
}

#[test]
fn two_processes_on_one_checkpoint_on_s3() {
    let _turn = turn();
    let broker = Broker::shared();
    let topic = "two_on_s3";
    fill(broker, topic, &telemetry());
    let s3 = S3::start();
    let pipeline = pipeline(&s3, topic);
    for step in ["plan.before_put", "commit_log.before_put"] {
        let mut first = pipeline.spawn_with(&[("FLOE_FAILPOINT", &format!("{step}:stop"))]);
        first.until_stopped();
        let before = offsets_in_tables(&pipeline.tables());
        pipeline.run_failing("plan.after_put:kill").expect_killed();
        first.signal(libc::SIGCONT);
        first.wait().expect_code(3).expect_output(&["another process owns"]);
        assert!(offsets_in_tables(&pipeline.tables()) >= before);
    }
    pipeline.run();
    everything(&pipeline, broker, &telemetry());
}

/// What becomes of the puts of one kind of file: every other one succeeds in silence, or with a gateway's error.
fn lossy(kind: fn(&str) -> bool) -> impl FnMut(&Request) -> Fault {
    let mut puts = 0;
    move |request| {
        if request.method != "PUT" || request.path.contains(".floe-") || !kind(&request.path) {
            return Fault::Pass;
        }
        puts += 1;
        match puts % 6 {
            1 => Fault::LoseAnswer,
            3 => Fault::AnswerAfter(500),
            5 => Fault::AnswerAfter(503),
            _ => Fault::Pass,
        }
    }
}

fn lost_puts(topic: &str, kind: fn(&str) -> bool) {
    let _turn = turn();
    let broker = Broker::shared();
    fill(broker, topic, &telemetry());
    let s3 = S3::start();
    let proxy = Proxy::start(&s3.address, lossy(kind));
    let mut pipeline = pipeline(&s3, topic);
    pipeline.on_s3(&s3, &proxy.uri);
    pipeline.run();
    let puts = proxy.seen().into_iter().filter(|(method, path, _)| method == "PUT" && kind(path)).count();
    assert!(puts >= 6, "only {puts} puts of this kind");
    everything(&pipeline, broker, &telemetry());
}

#[test]
fn lost_answers_to_puts_of_logs_and_state() {
    lost_puts("s3_lost_logs", |path| path.starts_with("/bucket/checkpoints/"));
}

#[test]
fn lost_answers_to_puts_of_data_files() {
    lost_puts("s3_lost_data", |path| path.ends_with(".parquet"));
}

#[test]
fn lost_answers_to_puts_of_manifests_and_metadata() {
    lost_puts("s3_lost_metadata", |path| path.ends_with(".avro") || path.ends_with(".metadata.json"));
}

/// A store that creates what is there already is refused before anything is written to it.
#[test]
fn a_store_without_conditional_puts_is_refused() {
    let _turn = turn();
    let topic = "s3_overwrites";
    fill(Broker::shared(), topic, &telemetry());
    let s3 = S3::moto();
    let proxy = Proxy::start(&s3.address, |_| Fault::Without("if-none-match"));
    let mut pipeline = pipeline(&s3, topic);
    pipeline.on_s3(&s3, &proxy.uri);
    let said = ["does not heed If-None-Match", "s3://bucket/checkpoints/s3_overwrites", "set checkpoint.location"];
    pipeline.check().expect_code(1).expect_output(&said);
    pipeline.spawn().wait().expect_code(3).expect_output(&said);
    let puts = proxy.seen().into_iter().filter(|(method, ..)| method == "PUT");
    assert!(puts.into_iter().all(|(_, path, _)| path.contains(".floe-")), "only probes were written");
}

/// The store's certificate is trusted by the system's variable.
#[test]
fn a_certificate_of_an_own_authority() {
    let _turn = turn();
    let broker = Broker::shared();
    let topic = "s3_tls";
    fill(broker, topic, &telemetry());
    let s3 = S3::start();
    let tls = Tls::before(&s3.address);
    let mut pipeline = Pipeline::new(&broker.bootstrap, topic);
    pipeline.on_s3(&s3, &tls.uri).env("AWS_ALLOW_HTTP", "false").set("source.max_offsets_per_trigger", 700);
    pipeline.check().expect_code(1).expect_output(&["invalid peer certificate"]);
    pipeline.env("SSL_CERT_FILE", tls.ca.to_str().unwrap());
    pipeline.run();
    everything(&pipeline, broker, &telemetry());
}
