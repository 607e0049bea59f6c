use std::collections::BTreeMap;
use std::fs;
use std::path::PathBuf;
use std::sync::OnceLock;

use serde_json::Value;

use crate::support::broker::Broker;
use crate::support::catalogs::{OAuth2Server, RestServer};
use crate::support::check::{DEAD_LETTERS, ROWS, WINDOWS, everything, fill};
use crate::support::floe::Pipeline;
use crate::support::proxy::{Fault, Proxy, Request};
use crate::support::reader::Tables;
use crate::support::s3::S3;
use crate::support::telemetry::Telemetry;
use crate::support::turn;

fn telemetry() -> Telemetry {
    Telemetry { messages: 4_000, ..Telemetry::default() }
}

fn topic() -> &'static str {
    static FILLED: OnceLock<&str> = OnceLock::new();
    FILLED.get_or_init(|| {
        fill(Broker::shared(), "rest", &telemetry());
        "rest"
    })
}

/// Four batches, and one without data that closes the last windows.
fn pipeline(uri: &str, server: &RestServer) -> Pipeline {
    let mut pipeline = Pipeline::new(&Broker::shared().bootstrap, topic());
    pipeline.rest(uri, &server.uri).set("source.max_offsets_per_trigger", 1_000);
    pipeline
}

fn everything_once(pipeline: &Pipeline) {
    everything(pipeline, Broker::shared(), &telemetry());
}

const KILLS: [&str; 5] =
    ["plan.after_put", "execute.files_written", "commit.metadata_written", "commit.committed", "commit_log.after_put"];

#[test]
fn killed_at_one_step_after_the_other() {
    let _turn = turn();
    let server = RestServer::start();
    let pipeline = pipeline(&server.uri, &server);
    for step in KILLS {
        pipeline.run_failing(&format!("{step}:kill")).expect_killed();
    }
    pipeline.run().expect_output(&["3 tables appear together (rest transaction)"]);
    everything_once(&pipeline);
    // Once more: there is nothing to do, and nothing is done.
    pipeline.run();
    everything_once(&pipeline);

    let tables = pipeline.tables();
    for name in [ROWS, WINDOWS, DEAD_LETTERS] {
        let by_duckdb: Vec<(u64,)> = tables.attached(&format!("select count(*) from r.{name}"));
        let table = tables.table(name);
        assert_eq!(table.rows, Some(by_duckdb[0].0), "{name}: PyIceberg and DuckDB, each through the catalog");
        assert_eq!((table.format_version, by_duckdb[0].0 > 0), (2, true), "{name}");
        assert_eq!(table.properties["write.metadata.delete-after-commit.enabled"], "true");
    }
    assert_eq!(tables.table(ROWS).partition_by, ["day event_timestamp_day"]);
    pipeline.check().expect_code(0).expect_output(&["keeps properties", "appear together (rest transaction)"]);
}

#[test]
fn one_table_after_another() {
    let _turn = turn();
    let server = RestServer::start();
    // Killed after the first, the second, the third table of a batch has it.
    let proxy = Proxy::without_transactions(&server.address, |_| Fault::Pass);
    let pipeline = pipeline(&proxy.uri, &server);
    // The first six commits try properties out.
    for nth in [7, 6, 2, 3, 1] {
        pipeline.run_failing(&format!("commit.committed:kill:{nth}")).expect_killed();
        pipeline.run_failing("commit.metadata_written:kill:2").expect_killed();
    }
    pipeline.run().expect_output(&["3 tables appear one after another (rest)"]);
    everything_once(&pipeline);
    assert!(proxy.seen().iter().all(|(_, path, _)| !path.ends_with("/transactions/commit")));
}

/// Every third commit goes through; the answers of the others are lost, or are a gateway's.
fn lossy() -> impl FnMut(&Request) -> Fault {
    let mut commits = 0;
    move |request| {
        if !request.is_commit() || request.body.contains("floe.probe") {
            return Fault::Pass;
        }
        commits += 1;
        match commits % 9 {
            1 => Fault::LoseAnswer,
            2 => Fault::AnswerAfter(500),
            4 => Fault::AnswerAfter(503),
            5 => Fault::AnswerAfter(504),
            7 => Fault::Lose,
            8 => Fault::AnswerAfter(502),
            _ => Fault::Pass,
        }
    }
}

#[test]
fn lost_answers_neither_lose_nor_double_a_row() {
    let _turn = turn();
    let server = RestServer::start();
    let proxy = Proxy::start(&server.address, lossy());
    let mut pipeline = pipeline(&proxy.uri, &server);
    pipeline.set("source.max_offsets_per_trigger", 500);
    pipeline.run();
    everything_once(&pipeline);
}

#[test]
fn lost_answers_for_one_table_after_another() {
    let _turn = turn();
    let server = RestServer::start();
    let proxy = Proxy::without_transactions(&server.address, lossy());
    let pipeline = pipeline(&proxy.uri, &server);
    pipeline.run();
    everything_once(&pipeline);
}

/// The answer to a commit is lost, the look at the tables fails too, then both come back: what the commit has referenced is
/// still there.
#[test]
fn files_of_a_commit_of_unknown_outcome_stay() {
    let _turn = turn();
    let server = RestServer::start();
    let mut dark = 0;
    let mut commits = 0;
    let proxy = Proxy::start(&server.address, move |request| {
        if request.is_commit() && !request.body.contains("floe.probe") {
            commits += 1;
            if commits % 2 == 1 {
                dark = 4;
                return Fault::LoseAnswer;
            }
        } else if dark > 0 {
            dark -= 1;
            return if dark % 2 == 0 { Fault::Lose } else { Fault::AnswerAfter(500) };
        }
        Fault::Pass
    });
    let pipeline = pipeline(&proxy.uri, &server);
    pipeline.run();
    everything_once(&pipeline);
}

/// Another writer is faster again and again.
#[test]
fn a_conflicting_writer() {
    let _turn = turn();
    let server = RestServer::start();
    let competitor = Tables::new(&server.uri);
    let mut commits = 0;
    let proxy = Proxy::start(&server.address, move |request| {
        if request.is_commit() && !request.body.contains("floe.probe") {
            commits += 1;
            if commits % 6 != 0 {
                competitor.touch([ROWS, WINDOWS, DEAD_LETTERS][commits % 3]);
            }
        }
        Fault::Pass
    });
    let pipeline = pipeline(&proxy.uri, &server);
    pipeline.run();
    everything_once(&pipeline);
    let conflicts = proxy.seen().iter().filter(|(_, _, status)| *status == 409).count();
    assert!(conflicts >= 10, "{conflicts}");
}

/// The commit of a process arrives when its successor has gone on. For a table without new rows too: there it would set
/// back the marker alone.
#[test]
fn a_stale_process_commits_late() {
    let _turn = turn();
    for (table, transactions) in [("dead_letters", false), ("device_minutes", false), ("", true)] {
        let server = RestServer::start();
        let mut held = false;
        let mut commits = 0;
        let rule = move |request: &Request| {
            let its = request.is_commit() && !request.body.contains("floe.probe") && request.path.contains(table);
            commits += usize::from(its);
            if its && commits == 2 && !held {
                held = true;
                return Fault::Hold;
            }
            Fault::Pass
        };
        let proxy = match transactions {
            true => Proxy::start(&server.address, rule),
            false => Proxy::without_transactions(&server.address, rule),
        };
        let mut telemetry = telemetry();
        telemetry.invalid_per_mille = 0;
        let topic = format!("rest_stale_{table}");
        fill(Broker::shared(), &topic, &telemetry);
        let mut pipeline = Pipeline::new(&Broker::shared().bootstrap, &topic);
        pipeline.rest(&proxy.uri, &server.uri).set("source.max_offsets_per_trigger", 1_000);
        let mut stale = pipeline.spawn();
        stale.until("its commit is held back", |_| (proxy.held() == 1).then_some(()));
        stale.kill();

        pipeline.rest(&server.uri, &server.uri);
        pipeline.run();
        let markers = || -> Vec<Value> {
            let marker = |properties: BTreeMap<String, String>| {
                let found = properties.into_iter().find(|(key, _)| key.starts_with("floe."));
                serde_json::from_str(&found.expect("a marker").1).unwrap()
            };
            [ROWS, WINDOWS, DEAD_LETTERS].map(|name| marker(pipeline.tables().table(name).properties)).into()
        };
        let before = markers();
        assert!(before.iter().all(|marker| marker["batch"] == 4), "{before:?}");
        assert_eq!(proxy.release(), [409], "{table}");
        assert_eq!(markers(), before, "{table}");
        everything(&pipeline, Broker::shared(), &telemetry);
        pipeline.run();
    }
}

fn refuse_properties(request: &Request) -> Fault {
    match request.body.contains("\"set-properties\"") {
        true => Fault::Refuse(403, "no custom properties here".into()),
        false => Fault::Pass,
    }
}

/// A catalog that takes no properties gets a tag.
#[test]
fn a_catalog_that_refuses_properties_gets_a_tag() {
    let _turn = turn();
    let server = RestServer::start();
    let proxy = Proxy::start(&server.address, refuse_properties);
    let pipeline = pipeline(&proxy.uri, &server);
    for step in ["commit.committed", "commit_log.after_put"] {
        pipeline.run_failing(&format!("{step}:kill")).expect_killed();
    }
    pipeline.run();
    everything_once(&pipeline);
    for name in [ROWS, WINDOWS, DEAD_LETTERS] {
        let table = pipeline.tables().table(name);
        assert!(table.properties.keys().all(|key| !key.starts_with("floe.")), "{:?}", table.properties);
        let metadata = fs::read_to_string(table.metadata_location.trim_start_matches("file:")).unwrap();
        assert!(metadata.contains("\"floe-"), "{metadata}");
        let newest = table.snapshots.last().unwrap();
        assert!(newest.summary.contains_key("floe.valid-through"), "{:?}", newest.summary);
    }
    pipeline.check().expect_code(0).expect_output(&["no custom properties here", "a tag on the last snapshot"]);
}

/// What a batch leaves for readers and for a lost checkpoint is with the tag then.
#[test]
fn a_checkpoint_is_rebuilt_by_the_tag() {
    let _turn = turn();
    let server = RestServer::start();
    let proxy = Proxy::start(&server.address, refuse_properties);
    let pipeline = pipeline(&proxy.uri, &server);
    for step in ["commit.committed:kill:2", "tidy:kill:2"] {
        pipeline.run_failing(step).expect_killed();
        fs::remove_dir_all(pipeline.checkpoint()).unwrap();
        // The tag tells a lost checkpoint as well as the property does.
        pipeline.spawn().wait().expect_code(3).expect_output(&["floe recover --from-table"]);
        let _ = fs::remove_dir_all(pipeline.checkpoint());
        pipeline.floe(&["recover", "--from-table"]).expect_code(0).expect_output(&["done: up to batch"]);
    }
    pipeline.run();
    everything_once(&pipeline);
}

#[test]
fn a_table_evolves() {
    let _turn = turn();
    let server = RestServer::start();
    let mut pipeline = pipeline(&server.uri, &server);
    pipeline.run();
    let mut schema: Value = serde_json::from_str(
        &fs::read_to_string(concat!(env!("CARGO_MANIFEST_DIR"), "/schemas/telemetry.json")).unwrap(),
    )
    .unwrap();
    schema["properties"]["firmware"] = serde_json::json!({"type": ["string", "null"]});
    let file = pipeline.dir().join("telemetry-2.json");
    fs::write(&file, schema.to_string()).unwrap();
    pipeline.set("schema.file", file.to_str().unwrap());
    pipeline.check().expect_code(0).expect_output(&["will add firmware string"]);
    pipeline.run();
    everything_once(&pipeline);
    let columns = pipeline.tables().table(ROWS).columns;
    assert!(columns.iter().any(|(name, kind, _)| name == "firmware" && kind == "string"), "{columns:?}");
}

#[test]
fn tables_are_maintained() {
    let _turn = turn();
    let server = RestServer::start();
    let mut pipeline = pipeline(&server.uri, &server);
    pipeline
        .set("source.max_offsets_per_trigger", 200)
        .set("maintenance.enabled", false)
        .set("maintenance.max_snapshots", 3)
        .set("maintenance.compact_min_files", 4);
    pipeline.run();
    let before = pipeline.tables().table(ROWS);
    assert!(before.snapshots.len() > 10, "{}", before.snapshots.len());
    pipeline.maintain(&[]).expect_code(0);
    let after = pipeline.tables().table(ROWS);
    assert!(after.snapshots.len() <= 5, "{}", after.snapshots.len());
    assert!(after.snapshots.iter().any(|s| s.summary.contains_key("deleted-data-files")), "{:?}", after.snapshots);
    everything_once(&pipeline);
    pipeline.set("maintenance.enabled", true);
    pipeline.run();
    everything_once(&pipeline);
}

#[test]
fn a_refused_token_says_what_to_do_and_is_not_shown() {
    let _turn = turn();
    let server = RestServer::start();
    let proxy = Proxy::start(&server.address, |request| match request.head.contains("Bearer right-one") {
        true if request.head.to_lowercase().contains("x-team: streams") => Fault::Pass,
        _ => Fault::Refuse(401, "who are you".into()),
    });
    let mut pipeline = pipeline(&proxy.uri, &server);
    pipeline.set("catalog.headers.x-team", "streams");
    for token in ["hunter2-and-more", "right-one"] {
        pipeline.set("catalog.token", token).env("RUST_LOG", "debug");
        let (check, run) = (pipeline.check(), pipeline.spawn().wait());
        for ended in [check, run] {
            assert!(!ended.output.contains(token), "{}", ended.output);
            match token {
                "right-one" => ended.expect_code(0),
                _ => {
                    assert_ne!(ended.code(), Some(0));
                    ended.expect_output(&["401", "who are you", "check catalog.token", &proxy.uri])
                }
            };
        }
    }
    everything_once(&pipeline);
}

#[test]
fn a_catalog_that_is_away_is_waited_for() {
    let _turn = turn();
    let server = RestServer::start();
    let mut requests = 0;
    let proxy = Proxy::start(&server.address, move |request| {
        requests += 1;
        match requests {
            1..=3 => Fault::Lose,
            4..=6 => Fault::AnswerAfter(503),
            // A table or namespace may be there after all.
            _ if request.method == "POST" && requests % 5 == 0 => Fault::LoseAnswer,
            _ => Fault::Pass,
        }
    });
    let pipeline = pipeline(&proxy.uri, &server);
    pipeline.run();
    everything_once(&pipeline);
    let mut nowhere = Pipeline::new(&Broker::shared().bootstrap, topic());
    nowhere.rest("http://127.0.0.1:9", &server.uri);
    assert_eq!(nowhere.check().expect_output(&["127.0.0.1:9"]).code(), Some(1));
}

/// Against an independent server that demands tokens. Needs Java 21 or later: `FLOE_TEST_JAVA=/path/to/bin/java`.
#[test]
#[ignore = "fetches 245 MB and needs Java 21; FLOE_TEST_JAVA names it"]
fn nessie_with_oauth2() {
    let _turn = turn();
    let java = PathBuf::from(std::env::var("FLOE_TEST_JAVA").expect("FLOE_TEST_JAVA"));
    let oauth2 = OAuth2Server::start();
    let s3 = S3::start();
    let endpoint = format!("http://{}", s3.address);
    let server = RestServer::nessie(
        &java,
        &endpoint,
        "bucket",
        &[
            ("nessie.server.authentication.enabled", "true"),
            ("quarkus.oidc.auth-server-url", &oauth2.issuer),
            ("quarkus.oidc.client-id", "floe"),
        ],
    );
    let mut pipeline = pipeline(&server.uri, &server);
    pipeline
        .set("catalog.warehouse", "wh")
        .env("AWS_ENDPOINT", &endpoint)
        .env("AWS_ALLOW_HTTP", "true")
        .env("AWS_ACCESS_KEY_ID", "test")
        .env("AWS_SECRET_ACCESS_KEY", "test")
        .env("AWS_REGION", "us-east-1");
    pipeline.check().expect_output(&["401"]);
    pipeline
        .set("catalog.credential", "floe:hunter2-and-more")
        .set("catalog.oauth2_server_uri", oauth2.token_uri.as_str());
    for step in KILLS {
        let ended = pipeline.run_failing(&format!("{step}:kill")).expect_killed();
        assert!(!ended.output.contains("hunter2"));
    }
    pipeline.run();
    let tables = Tables::over(
        &server.uri,
        serde_json::json!({
            "credential": "reader:any", "scope": "catalog", "oauth2-server-uri": oauth2.token_uri, "warehouse": "wh",
            "s3.endpoint": endpoint, "s3.access-key-id": "test", "s3.secret-access-key": "test",
            "s3.region": "us-east-1", "py-io-impl": "pyiceberg.io.pyarrow.PyArrowFileIO",
        }),
    );
    let truth = telemetry().truth();
    assert_eq!(tables.table(ROWS).rows, Some(truth.valid));
    assert_eq!(tables.table(DEAD_LETTERS).rows, Some(truth.dead_letters()));
    assert_eq!(tables.table(WINDOWS).rows, Some(truth.closed(pipeline.delay_ms()).len() as u64));
    pipeline.check().expect_code(0).expect_output(&["keeps properties"]);
}
