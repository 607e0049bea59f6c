use std::collections::BTreeMap;
use std::fs;
use std::sync::OnceLock;

use serde_json::Value;

use crate::support::broker::Broker;
use crate::support::catalogs::RestServer;
use crate::support::check::{DEAD_LETTERS, ROWS, WINDOWS, everything, fill};
use crate::support::floe::Pipeline;
use crate::support::proxy::{Fault, Proxy, Request};
use crate::support::reader::Tables;
use crate::support::telemetry::Telemetry;
use crate::support::tls::Tls;
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

/// Together with the next batch, though answers to commits are lost.
#[test]
fn a_table_evolves() {
    let _turn = turn();
    let server = RestServer::start();
    let mut pipeline = pipeline(&server.uri, &server);
    pipeline.run_failing("commit_log.after_put:kill:2").expect_killed();
    let mut schema: Value = serde_json::from_str(
        &fs::read_to_string(concat!(env!("CARGO_MANIFEST_DIR"), "/schemas/telemetry.json")).unwrap(),
    )
    .unwrap();
    schema["properties"]["firmware"] = serde_json::json!({"type": ["string", "null"]});
    let file = pipeline.dir().join("telemetry-2.json");
    fs::write(&file, schema.to_string()).unwrap();
    pipeline.set("schema.file", file.to_str().unwrap());
    pipeline.check().expect_code(0).expect_output(&["will add firmware string"]);
    let proxy = Proxy::start(&server.address, lossy());
    pipeline.rest(&proxy.uri, &server.uri);
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

#[test]
fn a_certificate_of_an_own_authority() {
    let _turn = turn();
    let server = RestServer::start();
    let tls = Tls::before(&server.address);
    let mut pipeline = pipeline(&tls.uri, &server);
    let refused = ["invalid peer certificate", "catalog.ca_file"];
    pipeline.check().expect_code(1).expect_output(&refused);
    let mut floe = pipeline.spawn();
    floe.until("it says what is wrong with the certificate", |floe| {
        refused.iter().all(|text| floe.output().contains(text)).then_some(())
    });
    floe.kill();
    // Of another authority, which is no better; and no certificate at all.
    let other = Tls::before(&server.address);
    pipeline.set("catalog.ca_file", other.ca.to_str().unwrap());
    pipeline.check().expect_code(1).expect_output(&refused);
    let empty = pipeline.dir().join("empty.pem");
    fs::write(&empty, "").unwrap();
    pipeline.set("catalog.ca_file", empty.to_str().unwrap());
    pipeline.check().expect_output(&["holds no certificate"]);

    pipeline.set("catalog.ca_file", tls.ca.to_str().unwrap());
    pipeline.run();
    everything_once(&pipeline);
}
