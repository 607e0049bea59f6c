use std::collections::BTreeMap;
use std::sync::Mutex;
use std::sync::atomic::{AtomicUsize, Ordering};

use axum::Router;
use axum::extract::{Request, State};
use axum::http::StatusCode as Status;
use axum::response::{IntoResponse, Response};

use super::*;
use crate::config::RestAuth;
use crate::error::Kind;
use crate::sink::iceberg::conformance;

#[path = "../../../../tests/support/catalogs.rs"]
mod servers;

fn config(uri: &str, auth: RestAuth) -> RestConfig {
    let uri = Url::parse(&format!("{uri}/")).unwrap();
    RestConfig { uri, warehouse: None, auth, headers: BTreeMap::new(), ca_file: None }
}

fn client_of(uri: &str) -> RestAuth {
    RestAuth::Client {
        id: Some("id".into()),
        secret: "p&ss:wörd".into(),
        scope: "catalog".into(),
        server: Some(Url::parse(&format!("{uri}/token")).unwrap()),
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn the_iceberg_projects_server_conforms() {
    let server = tokio::task::spawn_blocking(servers::RestServer::start).await.unwrap();
    let catalog = RestCatalog::open(&config(&server.uri, RestAuth::None), TableStorage::default()).await.unwrap();
    conformance::conforms(&catalog, "conformance").await;
    conformance::conforms(&catalog, "two.levels").await;
}

/// A server for what no real one at hand does: short tokens, vended credentials.
#[derive(Default)]
struct Mini {
    tokens: AtomicUsize,
    expires_in: f64,
    /// Tokens up to this one are refused.
    revoked: AtomicUsize,
    forms: Mutex<Vec<String>>,
    table: Mutex<Value>,
    seen: Mutex<Vec<String>>,
}

async fn mini(State(mini): State<Arc<Mini>>, request: Request) -> Response {
    let path = request.uri().path().to_string();
    let token = request.headers().get("authorization").map(|t| t.to_str().unwrap().to_string());
    let delegation = request.headers().get("x-iceberg-access-delegation").cloned();
    let body = axum::body::to_bytes(request.into_body(), 1 << 20).await.unwrap();
    if path == "/token" {
        mini.forms.lock().unwrap().push(String::from_utf8(body.to_vec()).unwrap());
        let n = mini.tokens.fetch_add(1, Ordering::SeqCst) + 1;
        return json!({"access_token": n.to_string(), "expires_in": mini.expires_in}).to_string().into_response();
    }
    let n: usize = token.as_deref().and_then(|t| t.strip_prefix("Bearer ")?.parse().ok()).unwrap_or(0);
    if n <= mini.revoked.load(Ordering::SeqCst) && mini.expires_in > 0.0 {
        return (Status::UNAUTHORIZED, json!({"error": {"message": "not you", "type": "x", "code": 401}}).to_string())
            .into_response();
    }
    assert_eq!(delegation.unwrap(), "vended-credentials");
    mini.seen.lock().unwrap().push(path.clone());
    if path.ends_with("/config") {
        let all = json!({"defaults": {"prefix": "wrong"}, "overrides": {"prefix": "a/b%3Ac"}});
        return all.to_string().into_response();
    }
    mini.table.lock().unwrap().to_string().into_response()
}

async fn serve(state: Mini) -> (String, Arc<Mini>) {
    let state = Arc::new(state);
    let app = Router::new().fallback(mini).with_state(state.clone());
    let listener = tokio::net::TcpListener::bind("127.0.0.1:0").await.unwrap();
    let uri = format!("http://{}", listener.local_addr().unwrap());
    tokio::spawn(async move { axum::serve(listener, app).await.unwrap() });
    (uri, state)
}

fn events() -> TableName {
    TableName::parse("a.b.t 1").unwrap()
}

fn table_json(more: Value) -> Value {
    let schema = iceberg::spec::Schema::builder().build().unwrap();
    let creation = TableCreation::builder().name("t".into()).location("s3://bucket/t".into()).schema(schema).build();
    let metadata =
        iceberg::spec::TableMetadataBuilder::from_table_creation(creation).unwrap().build().unwrap().metadata;
    let mut table = json!({"metadata-location": "s3://bucket/t/metadata/0.json", "metadata": metadata});
    table.as_object_mut().unwrap().extend(more.as_object().unwrap().clone());
    table
}

#[tokio::test(flavor = "multi_thread")]
async fn a_token_is_replaced_before_it_runs_out_and_when_it_is_refused() {
    let (uri, server) = serve(Mini { expires_in: 3600.0, ..Mini::default() }).await;
    *server.table.lock().unwrap() = table_json(json!({}));
    let catalog = RestCatalog::open(&config(&uri, client_of(&uri)), TableStorage::default()).await.unwrap();
    for _ in 0..3 {
        catalog.load(&events()).await.unwrap().unwrap();
    }
    assert_eq!(server.tokens.load(Ordering::SeqCst), 1, "one token for all");
    assert_eq!(
        server.forms.lock().unwrap()[0],
        "grant_type=client_credentials&client_secret=p%26ss%3Aw%C3%B6rd&scope=catalog&client_id=id"
    );
    assert_eq!(server.seen.lock().unwrap()[1], "/v1/a/b%3Ac/namespaces/a%1Fb/tables/t%201");
    server.revoked.store(1, Ordering::SeqCst);
    catalog.load(&events()).await.unwrap().unwrap();
    assert_eq!(server.tokens.load(Ordering::SeqCst), 2);
    server.revoked.store(1_000, Ordering::SeqCst);
    let error = catalog.load(&events()).await.unwrap_err();
    assert_eq!((error.kind(), server.tokens.load(Ordering::SeqCst)), (Kind::Fatal, 3), "refused twice: {error}");
    assert!(error.to_string().contains("not you; check catalog.token"), "{error}");
    assert!(!format!("{catalog:?}").contains("w%C3%B6rd"), "{catalog:?}");

    let (uri, server) = serve(Mini { expires_in: 0.2, ..Mini::default() }).await;
    *server.table.lock().unwrap() = table_json(json!({}));
    let catalog = RestCatalog::open(&config(&uri, client_of(&uri)), TableStorage::default()).await.unwrap();
    tokio::time::sleep(std::time::Duration::from_millis(250)).await;
    catalog.load(&events()).await.unwrap().unwrap();
    assert_eq!(server.tokens.load(Ordering::SeqCst), 2);
}

#[tokio::test(flavor = "multi_thread")]
async fn vended_credentials_are_used_for_their_location() {
    let (uri, server) = serve(Mini::default()).await;
    let keys = |id: &str| json!({"s3.access-key-id": id, "s3.secret-access-key": "hidden", "s3.region": "eu-north-1"});
    *server.table.lock().unwrap() = table_json(json!({
        "config": keys("of-config"),
        "storage-credentials": [{"prefix": "s3://bucket/t/special", "config": keys("of-prefix")}],
    }));
    let storage = TableStorage::default();
    let catalog = RestCatalog::open(&config(&uri, RestAuth::None), storage.clone()).await.unwrap();
    catalog.load(&events()).await.unwrap().unwrap();
    for (location, id) in [("s3://bucket/t/data/x", "of-config"), ("s3://bucket/t/special/x", "of-prefix")] {
        let (store, path) = storage.locate(location).unwrap();
        assert_eq!(path.as_ref(), location.trim_start_matches("s3://bucket/"));
        let shown = format!("{store:?}");
        assert!(shown.contains("eu-north-1") && !shown.contains("hidden"), "{id}: {shown}");
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn outcomes_tell_what_the_caller_does_next() {
    let failure = |outcome| Failure::for_tests(outcome);
    use super::client::Outcome::{Answered, Misconfigured, NoAnswer, NotSent};
    for (outcome, read, write) in [
        (Answered(reqwest::StatusCode::BAD_REQUEST), Kind::Fatal, Kind::Fatal),
        (Answered(reqwest::StatusCode::FORBIDDEN), Kind::Fatal, Kind::Fatal),
        (Answered(reqwest::StatusCode::TOO_MANY_REQUESTS), Kind::Transient, Kind::Transient),
        (Answered(reqwest::StatusCode::INTERNAL_SERVER_ERROR), Kind::Transient, Kind::Indeterminate),
        (Answered(reqwest::StatusCode::SERVICE_UNAVAILABLE), Kind::Transient, Kind::Indeterminate),
        (Answered(reqwest::StatusCode::GATEWAY_TIMEOUT), Kind::Transient, Kind::Indeterminate),
        (NoAnswer, Kind::Transient, Kind::Indeterminate),
        (NotSent, Kind::Transient, Kind::Transient),
        (Misconfigured, Kind::Fatal, Kind::Fatal),
    ] {
        assert_eq!(failure(outcome).of_read().kind(), read, "{outcome:?}");
        assert_eq!(failure(outcome).of_write().kind(), write, "{outcome:?}");
    }
}
