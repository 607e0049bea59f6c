//! The schemas of a registry that speaks Confluent's API, by id.
//!
//! Owns: asking (`GET schemas/ids/{id}`), how long an answer counts, what it means for records. Does not own: which
//! records ask ([`super::framing`]). Invariants: an id means the same schema for ever, so what was once found is never
//! asked for again; that an id is unknown is believed only of a registry that answers otherwise; any other trouble is an
//! error of the whole batch, never of a record.
//!
//! The one answer that may differ the next time is that an id is unknown. [`BatchRegistry`] makes it the same for all of a batch and,
//! from step 5 of the protocol ([`crate::checkpoint`]) on, for every replay.

use std::collections::{BTreeMap, BTreeSet, HashMap};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use jsonschema::{PatternOptions, Validator};
use reqwest::{Client, Response, StatusCode};
use serde::Deserialize;
use serde_json::Value;
use tokio::runtime::Handle;

use crate::config::RegistryConfig;
use crate::error::{Kind, chain};
use crate::schema::Schema;

/// Waits before an unknown id is asked for again: a registry may learn of a new schema a moment after its first record.
const WAITS: [Duration; 4] =
    [Duration::from_millis(200), Duration::from_millis(400), Duration::from_millis(800), Duration::from_millis(1600)];
/// With more unknown ids than this, something other than a slow registry is wrong, and none is waited for.
const MOST_AWAITED: usize = 16;
/// How long an unknown id counts as unknown.
const UNKNOWN_FOR: Duration = Duration::from_secs(30);
/// Unknown ids that are remembered: payloads of another kind can look like any number of them.
const MOST_REMEMBERED: usize = 10_000;
/// Steps that one match of a pattern may take: some take exponentially many, and nobody chooses their texts.
const BACKTRACK_LIMIT: usize = 100_000;
const CONNECT_TIMEOUT: Duration = Duration::from_secs(5);
const TIMEOUT: Duration = Duration::from_secs(10);

#[derive(Debug, thiserror::Error)]
#[error("schema registry {registry}: {message}")]
pub struct Error {
    registry: String,
    message: String,
}

impl Error {
    pub fn kind(&self) -> Kind {
        Kind::Transient
    }
}

/// What the registry holds under an id.
#[derive(Clone, Debug)]
pub enum Writer {
    /// A JSON Schema that records are held to, by the decoder.
    Compiled(Arc<Schema>),
    /// One with keywords that the decoder does not know.
    General(Arc<Validator>),
    /// One that cannot be checked here, and why: records are held to the pipeline's own schema alone.
    Unchecked(String),
    /// `AVRO`, `PROTOBUF`.
    OtherType(String),
    Unknown,
}

pub struct Registry {
    client: Client,
    config: RegistryConfig,
    /// Drives requests, for which the workers of a batch wait.
    runtime: Handle,
    known: Mutex<HashMap<u32, Writer>>,
    unknown: Mutex<HashMap<u32, Instant>>,
}

impl Registry {
    /// Asks nothing yet. To be called within a Tokio runtime.
    pub fn new(config: &RegistryConfig) -> Result<Registry, String> {
        let client = Client::builder()
            .connect_timeout(CONNECT_TIMEOUT)
            .timeout(TIMEOUT)
            // Not needed without TLS, and not there in every container.
            .tls_built_in_root_certs(config.url.scheme() == "https")
            .build();
        Ok(Registry {
            client: client.map_err(|e| format!("schema.registry: no HTTP client: {}", chain(&e)))?,
            config: config.clone(),
            runtime: Handle::try_current().map_err(|e| format!("schema.registry: {e}"))?,
            known: Mutex::default(),
            unknown: Mutex::default(),
        })
    }

    /// What each id stands for. Blocks; for threads outside of the runtime.
    pub fn writers(&self, ids: BTreeSet<u32>) -> Result<Vec<(u32, Writer)>, Error> {
        self.runtime.block_on(self.resolve(ids))
    }

    /// As [`Registry::writers`].
    pub async fn resolve(&self, ids: BTreeSet<u32>) -> Result<Vec<(u32, Writer)>, Error> {
        let mut writers = Vec::with_capacity(ids.len());
        let mut missing = Vec::new();
        for id in ids {
            match self.remembered(id) {
                Some(writer) => writers.push((id, writer)),
                None => missing.push(id),
            }
        }
        let mut waits = WAITS.iter();
        while !missing.is_empty() {
            let mut still = Vec::new();
            for id in missing {
                match self.fetch(id).await? {
                    Some(writer) => {
                        log(id, &writer);
                        lock(&self.known).insert(id, writer.clone());
                        writers.push((id, writer));
                    }
                    None => still.push(id),
                }
            }
            missing = still;
            if missing.is_empty() || lock(&self.unknown).len() + missing.len() > MOST_AWAITED {
                break;
            }
            let Some(wait) = waits.next() else { break };
            tokio::time::sleep(*wait).await;
        }
        if !missing.is_empty() {
            self.confirm().await?;
            let mut unknown = lock(&self.unknown);
            if unknown.len() > MOST_REMEMBERED {
                unknown.clear();
            }
            for id in missing {
                tracing::warn!(
                    id,
                    registry = self.config.place(),
                    "the schema registry does not know a record's schema"
                );
                unknown.insert(id, Instant::now());
                writers.push((id, Writer::Unknown));
            }
        }
        Ok(writers)
    }

    fn remembered(&self, id: u32) -> Option<Writer> {
        if !is_id(id) {
            return Some(Writer::Unknown);
        }
        if let Some(writer) = lock(&self.known).get(&id) {
            return Some(writer.clone());
        }
        let mut unknown = lock(&self.unknown);
        let since = *unknown.get(&id)?;
        if since.elapsed() < UNKNOWN_FOR {
            return Some(Writer::Unknown);
        }
        unknown.remove(&id);
        None
    }

    /// None: 404.
    async fn fetch(&self, id: u32) -> Result<Option<Writer>, Error> {
        let path = format!("schemas/ids/{id}");
        let response = self.get(&path).await?;
        if response.status() == StatusCode::NOT_FOUND {
            return Ok(None);
        }
        let text = self.body(&path, response).await?;
        let answer: Answer = serde_json::from_str(&text)
            .map_err(|e| self.error(format!("GET {path}: not the answer of a schema registry: {e}")))?;
        Ok(Some(answer.writer()))
    }

    /// A 404 may also come from a wrong path, or from a proxy whose registry is away: then this one fails too.
    pub async fn confirm(&self) -> Result<(), Error> {
        let path = "schemas/types";
        let response = self.get(path).await?;
        let text = self.body(path, response).await?;
        serde_json::from_str::<Vec<String>>(&text).map(|_| ()).map_err(|e| {
            self.error(format!("GET {path}: not the answer of a schema registry: {e}; check schema.registry"))
        })
    }

    async fn get(&self, path: &str) -> Result<Response, Error> {
        let failed = |message: String| self.error(format!("GET {path}: {message}"));
        let url = self.config.url.join(path).map_err(|e| failed(e.to_string()))?;
        let mut request =
            self.client.get(url).header("Accept", "application/vnd.schemaregistry.v1+json, application/json");
        if let Some((name, password)) = &self.config.credentials {
            request = request.basic_auth(name, password.as_ref());
        }
        request.send().await.map_err(|e| failed(chain(&e.without_url())))
    }

    async fn body(&self, path: &str, response: Response) -> Result<String, Error> {
        let status = response.status();
        let failed = |message: &str| self.error(format!("GET {path}: {message}"));
        match status {
            StatusCode::OK => response.text().await.map_err(|e| failed(&chain(&e.without_url()))),
            StatusCode::UNAUTHORIZED | StatusCode::FORBIDDEN => {
                Err(failed(&format!("{status}; check schema.registry_username and schema.registry_password")))
            }
            StatusCode::NOT_FOUND => Err(failed(&format!("{status}; check the path in schema.registry"))),
            _ => Err(failed(&status.to_string())),
        }
    }

    fn error(&self, message: String) -> Error {
        Error { registry: self.config.place(), message }
    }
}

/// What ids stand for throughout one execution of a batch: the first answer counts, for all of its workers.
pub struct BatchRegistry {
    registry: Arc<Registry>,
    answers: Mutex<BTreeMap<u32, Writer>>,
    /// The ids that are unknown are given.
    replay: bool,
}

impl BatchRegistry {
    /// `unknown`: what an earlier execution of the batch has logged.
    pub fn new(registry: Arc<Registry>, unknown: Option<BTreeSet<u32>>) -> BatchRegistry {
        let replay = unknown.is_some();
        let answers = unknown.into_iter().flatten().map(|id| (id, Writer::Unknown)).collect();
        BatchRegistry { registry, answers: Mutex::new(answers), replay }
    }

    /// As [`Registry::writers`]. One worker asks, and the others wait for the answer.
    pub fn writers(&self, ids: BTreeSet<u32>) -> Result<Vec<(u32, Writer)>, Error> {
        let mut answers = lock(&self.answers);
        let new: BTreeSet<u32> = ids.iter().filter(|id| !answers.contains_key(id)).copied().collect();
        if !new.is_empty() {
            for (id, writer) in self.registry.writers(new)? {
                if self.replay && matches!(writer, Writer::Unknown) && is_id(id) {
                    let message = format!(
                        "schema {id} is unknown, and was known when this batch was executed first; register it again under its id"
                    );
                    return Err(self.registry.error(message));
                }
                answers.insert(id, writer);
            }
        }
        Ok(ids.into_iter().filter_map(|id| answers.get(&id).map(|writer| (id, writer.clone()))).collect())
    }

    /// The ids that may be known the next time.
    pub fn unknown(&self) -> BTreeSet<u32> {
        let answers = lock(&self.answers);
        let unknown = answers.iter().filter(|(id, writer)| is_id(**id) && matches!(writer, Writer::Unknown));
        unknown.map(|(id, _)| *id).collect()
    }
}

/// Ids are positive 32-bit integers; registries do not even read others.
fn is_id(id: u32) -> bool {
    id <= i32::MAX as u32
}

#[derive(Deserialize)]
struct Answer {
    schema: String,
    #[serde(rename = "schemaType")]
    schema_type: Option<String>,
}

impl Answer {
    fn writer(self) -> Writer {
        match self.schema_type.as_deref() {
            Some("JSON") => Writer::compile(&self.schema),
            // Left out by registries for their first type.
            other => Writer::OtherType(other.unwrap_or("AVRO").into()),
        }
    }
}

impl Writer {
    fn compile(document: &str) -> Writer {
        if let Some(schema) = compile(document) {
            return Writer::Compiled(schema);
        }
        let document: Value = match serde_json::from_str(document) {
            Ok(document) => document,
            Err(e) => return Writer::Unchecked(format!("not JSON: {e}")),
        };
        // Of the draft that `$schema` names. References to other documents are not followed.
        let validator = jsonschema::options()
            .should_validate_formats(true)
            .with_pattern_options(PatternOptions::fancy_regex().backtrack_limit(BACKTRACK_LIMIT))
            .build(&document);
        match validator {
            Ok(validator) => Writer::General(Arc::new(validator)),
            Err(e) => Writer::Unchecked(e.to_string()),
        }
    }
}

/// For the decoder, which is faster by far. Serializers write draft-07 or 2019-09: where none of the keywords occurs that
/// have changed since, they mean the same.
fn compile(document: &str) -> Option<Arc<Schema>> {
    const OLDER: [&str; 3] = ["draft-06/schema", "draft-07/schema", "draft/2019-09/schema"];
    const CHANGED: [&str; 6] =
        ["\"$ref\"", "\"$recursiveRef\"", "\"items\"", "\"additionalItems\"", "\"dependencies\"", "\"definitions\""];
    if let Ok(Value::Object(mut members)) = serde_json::from_str(document)
        && let Some(Value::String(draft)) = members.get("$schema")
        && OLDER.iter().any(|older| draft.trim_end_matches('#').ends_with(older))
    {
        if CHANGED.iter().any(|keyword| document.contains(keyword)) {
            return None;
        }
        members.remove("$schema");
        let schema = Schema::parse(&Value::Object(members).to_string()).ok();
        // A second pass would be by the rules of the newest draft.
        return schema.filter(|schema| schema.validator.is_none());
    }
    Schema::parse(document).ok()
}

fn log(id: u32, writer: &Writer) {
    match writer {
        Writer::Unchecked(problem) => {
            tracing::warn!(id, problem, "this schema cannot be checked: its records are held to schema.file alone");
        }
        Writer::OtherType(found) => tracing::warn!(id, found, "records of this schema are no JSON and are refused"),
        Writer::Compiled(_) | Writer::General(_) | Writer::Unknown => {
            tracing::info!(id, "schema learned from the registry")
        }
    }
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

#[cfg(test)]
mod tests {
    use std::sync::atomic::{AtomicU16, AtomicUsize, Ordering};

    use axum::Router;
    use axum::extract::{Path, State};
    use axum::http::{HeaderMap, StatusCode as Status, Uri};
    use axum::routing::get;

    use super::*;

    /// A registry that answers as it is told to.
    #[derive(Default)]
    struct Peer {
        requests: AtomicUsize,
        /// Answered with instead, unless 0.
        status: AtomicU16,
        /// Id 9 is learned after so many requests for it.
        late: AtomicUsize,
        authorization: Mutex<Option<String>>,
    }

    async fn answer(State(peer): State<Arc<Peer>>, Path(id): Path<u32>, headers: HeaderMap) -> (Status, String) {
        peer.requests.fetch_add(1, Ordering::SeqCst);
        *lock(&peer.authorization) = headers.get("authorization").map(|v| v.to_str().unwrap().to_owned());
        let status = peer.status.load(Ordering::SeqCst);
        if status != 0 {
            return (Status::from_u16(status).unwrap(), "oops".into());
        }
        let schema = |document: &str, kind: &str| {
            (Status::OK, serde_json::json!({"schema": document, "schemaType": kind}).to_string())
        };
        match id {
            1 => schema(r#"{"type": "object", "properties": {"a": {"type": "integer"}}}"#, "JSON"),
            2 => schema(
                r#"{"$schema": "http://json-schema.org/draft-07/schema#", "type": "object", "properties": {"a": {"type": "integer"}}}"#,
                "JSON",
            ),
            3 => schema(r#"{"$schema": "http://json-schema.org/draft-07/schema#", "$ref": "other"}"#, "JSON"),
            6 => schema(
                r##"{"$schema": "http://json-schema.org/draft-07/schema#", "$ref": "#/definitions/A",
                    "definitions": {"A": {"type": "object", "properties": {"a": {"oneOf": [{"type": "null"}, {"type": "integer"}]}}}}}"##,
                "JSON",
            ),
            4 => (Status::OK, r#"{"schema": "\"string\""}"#.into()),
            5 => (Status::OK, "<html>".into()),
            9 if peer.late.fetch_sub(1, Ordering::SeqCst) <= 1 => {
                schema(r#"{"type": "object", "properties": {"a": {"type": "integer"}}}"#, "JSON")
            }
            _ => (Status::NOT_FOUND, r#"{"error_code": 40403, "message": "Schema not found"}"#.into()),
        }
    }

    async fn start(peer: &Arc<Peer>, credentials: &str) -> Registry {
        let types = get(async |State(peer): State<Arc<Peer>>| match peer.status.load(Ordering::SeqCst) {
            0 => (Status::OK, r#"["JSON", "AVRO"]"#),
            status => (Status::from_u16(status).unwrap(), "oops"),
        });
        let routes = Router::new()
            .route("/ccompat/v7/schemas/ids/{id}", get(answer))
            .route("/ccompat/v7/schemas/types", types)
            .fallback(async |_: Uri| Status::NOT_FOUND)
            .with_state(peer.clone());
        let listener = tokio::net::TcpListener::bind("127.0.0.1:0").await.unwrap();
        let address = listener.local_addr().unwrap();
        tokio::spawn(async move { axum::serve(listener, routes).await });
        at(&format!("http://{credentials}{address}/ccompat/v7/"))
    }

    fn at(url: &str) -> Registry {
        Registry::new(&RegistryConfig { url: url.parse().unwrap(), credentials: None }).unwrap()
    }

    async fn one(registry: &Registry, id: u32) -> Result<Writer, Error> {
        Ok(registry.resolve(BTreeSet::from([id])).await?.remove(0).1)
    }

    #[tokio::test]
    async fn an_id_is_asked_for_once() {
        let peer = Arc::new(Peer::default());
        let registry = start(&peer, "me:p%40ss@").await;
        for _ in 0..3 {
            assert!(matches!(one(&registry, 1).await, Ok(Writer::Compiled(_))));
        }
        assert_eq!(peer.requests.load(Ordering::SeqCst), 1);
        assert_eq!(lock(&peer.authorization).as_deref(), Some("Basic bWU6cEBzcw=="));
        peer.status.store(503, Ordering::SeqCst);
        assert!(one(&registry, 1).await.is_ok(), "what is known needs no registry");
        let error = one(&registry, 2).await.unwrap_err().to_string();
        assert!(error.contains("503") && !error.contains("p%40ss") && !error.contains("p@ss"), "{error}");
    }

    #[tokio::test]
    async fn schemas_of_every_draft_are_checked() {
        let peer = Arc::new(Peer::default());
        let registry = start(&peer, "").await;
        assert!(matches!(one(&registry, 2).await, Ok(Writer::Compiled(_))), "draft-07");
        assert!(matches!(one(&registry, 3).await, Ok(Writer::Unchecked(_))), "another document");
        let Ok(Writer::General(validator)) = one(&registry, 6).await else { panic!("as serializers write it") };
        assert!(
            validator.is_valid(&serde_json::json!({"a": 1})) && !validator.is_valid(&serde_json::json!({"a": "1"}))
        );
        assert!(matches!(one(&registry, 4).await, Ok(Writer::OtherType(t)) if t == "AVRO"));
        assert!(one(&registry, 5).await.is_err(), "no registry's answer");
    }

    #[tokio::test]
    async fn an_unknown_id_is_asked_for_again_for_a_while() {
        let peer = Arc::new(Peer::default());
        let registry = start(&peer, "").await;
        peer.late.store(3, Ordering::SeqCst);
        assert!(matches!(one(&registry, 9).await, Ok(Writer::Compiled(_))));
        assert_eq!(peer.requests.swap(0, Ordering::SeqCst), 3);
        assert!(matches!(one(&registry, 8).await, Ok(Writer::Unknown)));
        assert!(matches!(one(&registry, 8).await, Ok(Writer::Unknown)));
        assert_eq!(peer.requests.swap(0, Ordering::SeqCst), 1 + WAITS.len());
        assert!(matches!(one(&registry, u32::MAX).await, Ok(Writer::Unknown)));
        assert_eq!(peer.requests.load(Ordering::SeqCst), 0);
        // Many of them are not waited for: each is asked for once.
        assert_eq!(registry.resolve((100..200).collect()).await.unwrap().len(), 100);
        assert_eq!(peer.requests.load(Ordering::SeqCst), 100);
    }

    #[tokio::test]
    async fn trouble_with_the_registry_is_never_an_unknown_id() {
        let peer = Arc::new(Peer::default());
        let registry = start(&peer, "").await;
        for status in [401, 403, 429, 500, 502, 503] {
            peer.status.store(status, Ordering::SeqCst);
            let error = one(&registry, 1).await.unwrap_err();
            assert_eq!(error.kind(), Kind::Transient);
            assert!(error.to_string().contains(&status.to_string()), "{error}");
        }
        // All paths answer 404, as behind a proxy whose registry is away.
        peer.status.store(404, Ordering::SeqCst);
        assert!(one(&registry, 1).await.is_err());
        peer.status.store(0, Ordering::SeqCst);
        let mut elsewhere = registry.config.url.clone();
        elsewhere.set_path("/elsewhere/");
        assert!(one(&at(elsewhere.as_str()), 1).await.is_err(), "a wrong path");
        assert!(matches!(one(&registry, 1).await, Ok(Writer::Compiled(_))));
        let gone = at("http://127.0.0.1:9/");
        assert!(one(&gone, 1).await.unwrap_err().to_string().contains("127.0.0.1:9"));
    }
}
