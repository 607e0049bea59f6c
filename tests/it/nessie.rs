//! An independent catalog, Nessie, that demands OAuth2 tokens and keeps a history which its tables do not show.

use std::collections::BTreeSet;
use std::path::PathBuf;
use std::time::Duration;

use serde_json::json;

use crate::support::broker::Broker;
use crate::support::catalogs::{OAuth2Server, RestServer};
use crate::support::check::{DEAD_LETTERS, ROWS, WINDOWS, everything, fill};
use crate::support::floe::{Pipeline, http_get};
use crate::support::proxy::{Fault, Proxy, Request};
use crate::support::reader::Tables;
use crate::support::s3::{self, S3};
use crate::support::telemetry::Telemetry;
use crate::support::turn;

const SECRET: &str = "hunter2-and-more";

fn telemetry() -> Telemetry {
    Telemetry { messages: 4_000, ..Telemetry::default() }
}

fn everything_once(pipeline: &Pipeline) {
    everything(pipeline, Broker::shared(), &telemetry());
}

/// Nessie over a store of its own, with tokens of `issuer`.
struct Nessie {
    server: RestServer,
    s3: S3,
    issuer: String,
}

impl Nessie {
    fn start(issuer: &str) -> Nessie {
        let java = PathBuf::from(std::env::var("FLOE_TEST_JAVA").expect("FLOE_TEST_JAVA"));
        let s3 = S3::start();
        let authentication = [
            ("nessie.server.authentication.enabled", "true"),
            ("quarkus.oidc.auth-server-url", issuer),
            ("quarkus.oidc.client-id", "floe"),
        ];
        let server = RestServer::nessie(&java, &s3.uri(), "bucket", &authentication);
        Nessie { server, s3, issuer: issuer.to_string() }
    }

    /// That reaches the catalog through `proxy`, if there is one, and has no credential yet.
    fn pipeline(&self, topic: &str, proxy: Option<&Proxy>) -> Pipeline {
        fill(Broker::shared(), topic, &telemetry());
        let mut pipeline = Pipeline::new(&Broker::shared().bootstrap, topic);
        let uri = proxy.map_or(self.server.uri.clone(), |proxy| format!("{}/iceberg", proxy.uri));
        pipeline.rest(&uri, &self.server.uri).readers_know(self.reader());
        s3::environment(&mut pipeline, &self.s3.uri());
        pipeline.set("catalog.warehouse", "wh");
        pipeline
    }

    fn credential(&self, pipeline: &mut Pipeline) {
        pipeline
            .set("catalog.credential", format!("floe:{SECRET}"))
            .set("catalog.oauth2_server_uri", format!("{}/token", self.issuer));
    }

    fn reader(&self) -> serde_json::Value {
        let mut properties = self.s3.properties();
        let token_uri = format!("{}/token", self.issuer);
        for (key, value) in
            [("credential", "reader:any"), ("scope", "catalog"), ("oauth2-server-uri", &token_uri), ("warehouse", "wh")]
        {
            properties[key] = json!(value);
        }
        properties
    }

    fn objects(&self) -> BTreeSet<String> {
        let (mut objects, mut after) = (BTreeSet::new(), String::new());
        loop {
            let path = format!("/bucket?list-type=2&start-after={after}");
            let (_, _, listing) = http_get(&self.s3.address, &path).expect("a listing; moto asks for no signature");
            let keys: Vec<&str> =
                listing.split("<Key>").skip(1).map(|rest| rest.split("</Key>").next().unwrap()).collect();
            let Some(last) = keys.last() else { return objects };
            after = last.to_string();
            objects.extend(keys.into_iter().map(String::from));
        }
    }
}

#[test]
#[ignore = "fetches 245 MB and needs Java 21; FLOE_TEST_JAVA names it"]
fn killed_at_one_step_after_the_other() {
    let _turn = turn();
    let oauth2 = OAuth2Server::start(None);
    let nessie = Nessie::start(&oauth2.issuer);
    let mut pipeline = nessie.pipeline("nessie", None);
    pipeline.set("source.max_offsets_per_trigger", 700);
    pipeline.check().expect_code(1).expect_output(&["401", "check catalog.token, catalog.credential"]);
    nessie.credential(&mut pipeline);
    for step in [
        "plan.after_put",
        "execute.files_written",
        "commit.metadata_written",
        "commit.committed",
        "commit_log.after_put",
    ] {
        let ended = pipeline.run_failing(&format!("{step}:kill:2")).expect_killed();
        assert!(!ended.output.contains(SECRET), "{}", ended.output);
    }
    pipeline.run();
    everything_once(&pipeline);
    pipeline.run();
    everything_once(&pipeline);
    for name in [ROWS, WINDOWS, DEAD_LETTERS] {
        assert!(pipeline.tables().table(name).rows.is_some_and(|rows| rows > 0), "PyIceberg reads {name}");
    }
    let checked = pipeline.check().expect_code(0).expect_output(&["keeps properties", "appear one after another"]);
    assert!(!checked.output.contains(SECRET), "{}", checked.output);
}

/// Tokens that live for seconds: replaced before their end where the server says when that is, and once they are refused
/// where it does not.
#[test]
#[ignore = "fetches 245 MB and needs Java 21; FLOE_TEST_JAVA names it"]
fn tokens_are_renewed() {
    let _turn = turn();
    for says_when in [true, false] {
        let oauth2 = OAuth2Server::start(Some(Duration::from_secs(4)));
        let hidden = if says_when { "no such text" } else { "expires_in" };
        let token_server = Proxy::hiding(&oauth2.address, "/token", hidden, |_| Fault::Pass);
        let nessie = Nessie::start(&format!("{}/default", token_server.uri));
        let proxy = Proxy::start(&nessie.server.address, |_| Fault::Pass);
        let mut pipeline = nessie.pipeline(&format!("nessie_tokens_{says_when}"), Some(&proxy));
        nessie.credential(&mut pipeline);
        pipeline.set("source.max_offsets_per_trigger", 150);
        pipeline.run();
        let tokens = token_server.seen().iter().filter(|(_, path, _)| path.ends_with("/token")).count();
        let refused = proxy.seen().iter().filter(|(_, _, status)| *status == 401).count();
        assert!(tokens >= 2, "{tokens} tokens");
        assert_eq!(refused == 0, says_when, "{refused} of {} requests refused, {tokens} tokens", proxy.seen().len());
        everything_once(&pipeline);
    }
}

/// Nessie shows the newest snapshot and keeps all of them: whatever a version of a table needs has to stay, also where
/// others were faster and files were written for nothing.
#[test]
#[ignore = "fetches 245 MB and needs Java 21; FLOE_TEST_JAVA names it"]
fn maintenance_leaves_the_history_alone() {
    let _turn = turn();
    let oauth2 = OAuth2Server::start(None);
    let nessie = Nessie::start(&oauth2.issuer);
    let competitor = Tables::over(&nessie.server.uri, nessie.reader());
    let mut commits = 0;
    let proxy = Proxy::start(&nessie.server.address, move |request: &Request| {
        if request.is_commit() && request.path.ends_with("/events") && !request.body.contains("floe.probe") {
            commits += 1;
            if commits % 3 == 1 {
                competitor.touch(ROWS);
            }
        }
        Fault::Pass
    });
    let mut pipeline = nessie.pipeline("nessie_history", Some(&proxy));
    nessie.credential(&mut pipeline);
    pipeline
        .set("source.max_offsets_per_trigger", 500)
        .set("maintenance.enabled", false)
        .set("maintenance.max_snapshots", 2)
        .set("maintenance.compact_min_files", 4);
    pipeline.run();
    assert!(proxy.seen().iter().any(|(_, _, status)| *status == 409), "conflicts");
    everything_once(&pipeline);

    let before = nessie.objects();
    let rows = pipeline.tables().table(ROWS);
    assert_eq!((rows.snapshots.len(), rows.properties["gc.enabled"].as_str()), (1, "false"));
    pipeline.maintain(&[]).expect_code(0).expect_output(&["small files compacted"]);
    let gone: Vec<String> = before.difference(&nessie.objects()).cloned().collect();
    assert!(gone.is_empty(), "{gone:?} of {}", before.len());
    everything_once(&pipeline);
    pipeline.set("maintenance.enabled", true);
    pipeline.run();
    let gone: Vec<String> = before.difference(&nessie.objects()).cloned().collect();
    assert!(gone.is_empty(), "{gone:?} of {}", before.len());
    everything_once(&pipeline);
}
