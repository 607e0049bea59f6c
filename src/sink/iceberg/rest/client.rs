//! One HTTP request to a REST catalog, and what its outcome means.
//!
//! Owns: addresses, headers, a refused token's second try, and which failures leave it unknown whether the server has
//! acted. Does not own: any other retry. Invariant: a request that changes something is never sent again by itself.

use std::fmt;
use std::time::Duration;

use bytes::Bytes;
use reqwest::header::{HeaderMap, HeaderName, HeaderValue};
use reqwest::{Method, StatusCode};
use serde::Deserialize;
use url::Url;

use super::auth::{Auth, Outgoing};
use super::sigv4::encode;
use crate::config::{RestAuth, RestConfig};
use crate::error::chain;
use crate::sink::Error;
use crate::sink::iceberg::catalog::TableName;

const CONNECT_TIMEOUT: Duration = Duration::from_secs(5);
/// Longer than any server works on a commit.
const TIMEOUT: Duration = Duration::from_secs(60);
/// 419, of the Iceberg specification: the token has run out.
const TOKEN_EXPIRED: u16 = 419;

#[derive(Debug)]
pub struct Client {
    http: reqwest::Client,
    base: Url,
    /// Ends in a slash, or is empty.
    prefix: String,
    headers: HeaderMap,
    auth: Auth,
}

/// Why a request has no result.
#[derive(Debug)]
pub struct Failure {
    pub outcome: Outcome,
    /// The type of the error in the specification, where the server names one.
    pub error_type: Option<String>,
    message: String,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Outcome {
    /// The server says no, or that it cannot.
    Answered(StatusCode),
    /// It went out, and no answer came back.
    NoAnswer,
    /// It never went out.
    NotSent,
    /// It never went out and never will.
    Misconfigured,
}

impl fmt::Display for Failure {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.message)
    }
}

impl Failure {
    #[cfg(test)]
    pub fn for_tests(outcome: Outcome) -> Failure {
        Failure { outcome, error_type: None, message: "message".into() }
    }

    /// A request that changes nothing can be made again.
    pub fn of_read(self) -> Error {
        match self.outcome {
            Outcome::Answered(status) if !passes(status) => Error::fatal(self.message),
            Outcome::Misconfigured => Error::fatal(self.message),
            _ => Error::transient(self.message),
        }
    }

    /// Of a request that changes something, only a refusal tells that nothing has changed: a server, or a proxy before it,
    /// may fail after the work is done.
    pub fn of_write(self) -> Error {
        match self.outcome {
            Outcome::Answered(StatusCode::TOO_MANY_REQUESTS) | Outcome::NotSent => Error::transient(self.message),
            Outcome::Answered(status) if !passes(status) => Error::fatal(self.message),
            Outcome::Misconfigured => Error::fatal(self.message),
            _ => Error::indeterminate(format!("{}: whether it has happened is unknown", self.message)),
        }
    }

    /// 404 in the form of a catalog, not of a wrong path.
    pub fn is_not_found(&self) -> bool {
        self.outcome == Outcome::Answered(StatusCode::NOT_FOUND) && self.error_type.is_some()
    }

    pub fn is_conflict(&self) -> bool {
        self.outcome == Outcome::Answered(StatusCode::CONFLICT)
    }
}

/// Answers that another time may be others.
fn passes(status: StatusCode) -> bool {
    status.is_server_error() || matches!(status, StatusCode::TOO_MANY_REQUESTS | StatusCode::REQUEST_TIMEOUT)
}

#[derive(Deserialize)]
struct ErrorAnswer {
    error: ErrorModel,
}

#[derive(Deserialize)]
struct ErrorModel {
    #[serde(default)]
    message: Option<String>,
    #[serde(default, rename = "type")]
    error_type: Option<String>,
}

impl Client {
    pub fn new(config: &RestConfig) -> Result<Client, Error> {
        let mut builder = reqwest::Client::builder()
            .connect_timeout(CONNECT_TIMEOUT)
            .timeout(TIMEOUT)
            .user_agent(concat!("floe/", env!("CARGO_PKG_VERSION")))
            // Not needed without TLS, and not there in every container.
            .tls_built_in_root_certs(needs_tls(config))
            // What is sent to one server is not meant for another.
            .redirect(reqwest::redirect::Policy::none());
        if let Some(file) = &config.ca_file {
            let failed = |e: &dyn fmt::Display| Error::fatal(format!("catalog.ca_file {}: {e}", file.display()));
            let pem = std::fs::read(file).map_err(|e| failed(&e))?;
            let certificates = reqwest::Certificate::from_pem_bundle(&pem).map_err(|e| failed(&e))?;
            if certificates.is_empty() {
                return Err(failed(&"holds no certificate in PEM"));
            }
            for certificate in certificates {
                builder = builder.add_root_certificate(certificate);
            }
        }
        let http =
            builder.build().map_err(|e| Error::fatal(format!("no HTTP client for the catalog: {}", chain(&e))))?;
        let mut headers = HeaderMap::new();
        headers.insert("accept", HeaderValue::from_static("application/json"));
        headers.insert("x-iceberg-access-delegation", HeaderValue::from_static("vended-credentials"));
        for (name, value) in &config.headers {
            let failed = |e: &dyn fmt::Display| Error::fatal(format!("catalog.headers: {name}: {e}"));
            let mut value = HeaderValue::from_str(value).map_err(|e| failed(&e))?;
            value.set_sensitive(true);
            headers.insert(HeaderName::from_bytes(name.as_bytes()).map_err(|e| failed(&e))?, value);
        }
        Ok(Client { http, base: config.uri.clone(), prefix: String::new(), headers, auth: Auth::new(config)? })
    }

    pub fn base(&self) -> &Url {
        &self.base
    }

    /// What `GET v1/config` says about the addresses of all else.
    pub fn redirect(&mut self, base: Option<Url>, prefix: Option<&str>) {
        if let Some(mut base) = base {
            let path = base.path().trim_end_matches('/').to_string();
            base.set_path(&format!("{}/", path.strip_suffix("/v1").unwrap_or(&path)));
            self.base = base;
        }
        if let Some(prefix) = prefix.map(|p| p.trim_matches('/')).filter(|p| !p.is_empty()) {
            self.prefix = format!("{prefix}/");
        }
    }

    /// `path` below `v1`, for the one request that has no prefix.
    pub async fn get_config(&self, query: &[(&str, &str)]) -> Result<Bytes, Failure> {
        self.send(Method::GET, "v1/config", query, None).await
    }

    pub async fn get(&self, path: &str) -> Result<Bytes, Failure> {
        self.send(Method::GET, &format!("v1/{}{path}", self.prefix), &[], None).await
    }

    pub async fn post(&self, path: &str, body: &serde_json::Value) -> Result<Bytes, Failure> {
        let body = Bytes::from(body.to_string());
        self.send(Method::POST, &format!("v1/{}{path}", self.prefix), &[], Some(body)).await
    }

    async fn send(
        &self,
        method: Method,
        path: &str,
        query: &[(&str, &str)],
        body: Option<Bytes>,
    ) -> Result<Bytes, Failure> {
        let called = format!("catalog {}: {method} {path}", self.base);
        let failed = |outcome, why: &dyn fmt::Display| Failure {
            outcome,
            error_type: None,
            message: format!("{called}: {why}"),
        };
        let mut url = self.base.join(path).map_err(|e| failed(Outcome::Misconfigured, &e))?;
        if !query.is_empty() {
            let query = query.iter().map(|(k, v)| format!("{}={}", encode(k), encode(v))).collect::<Vec<_>>();
            url.set_query(Some(&query.join("&")));
        }
        let mut refused: Option<HeaderValue> = None;
        loop {
            let outgoing = Outgoing { method: &method, url: &url, body: body.as_deref().unwrap_or_default() };
            let auth = self.auth.headers(&self.http, &outgoing, refused.as_ref()).await.map_err(|e| Failure {
                outcome: if matches!(e, Error::Fatal { .. }) { Outcome::Misconfigured } else { Outcome::NotSent },
                error_type: None,
                message: e.to_string(),
            })?;
            let token = auth.get(reqwest::header::AUTHORIZATION).cloned();
            // A header that the user has set by the same name wins.
            let mut headers = auth;
            headers.extend(self.headers.clone());
            let mut request = self.http.request(method.clone(), url.clone()).headers(headers);
            if let Some(body) = &body {
                request = request.header("content-type", "application/json").body(body.clone());
            }
            let no_answer = |e: reqwest::Error| {
                let outcome = if e.is_connect() { Outcome::NotSent } else { Outcome::NoAnswer };
                failed(outcome, &cause(e))
            };
            let answer = request.send().await.map_err(no_answer)?;
            let status = answer.status();
            if matches!(status.as_u16(), 401 | TOKEN_EXPIRED) && self.auth.renews() && refused.is_none() {
                tracing::debug!(%status, "the catalog refuses the token; getting another one");
                refused = token;
                continue;
            }
            let answered = answer.bytes().await.map_err(|e| failed(Outcome::NoAnswer, &cause(e)))?;
            if status.is_success() {
                return Ok(answered);
            }
            let model = serde_json::from_slice::<ErrorAnswer>(&answered).ok().map(|answer| answer.error);
            let (message, error_type) = match model {
                Some(model) => (model.message, Some(model.error_type.unwrap_or_default())),
                None => (None, None),
            };
            let mut failure = failed(Outcome::Answered(status), &status);
            if let Some(message) = message {
                failure.message.push_str(": ");
                failure.message.extend(message.chars().take(500));
            }
            if let Some(advice) = advice(status, error_type.is_some()) {
                failure.message.push_str("; ");
                failure.message.push_str(advice);
            }
            failure.error_type = error_type;
            return Err(failure);
        }
    }
}

/// Why there is no answer. The URL is in the message already.
pub fn cause(error: reqwest::Error) -> String {
    let mut cause = chain(&error.without_url());
    // The error of the TLS library is of no type that could be asked for it.
    if cause.contains("invalid peer certificate") {
        cause.push_str("; if its issuer is to be trusted, name the issuer's certificate in catalog.ca_file");
    }
    cause
}

fn needs_tls(config: &RestConfig) -> bool {
    let server = match &config.auth {
        RestAuth::Client { server: Some(server), .. } => server.scheme(),
        _ => "",
    };
    // The server may send us on to another address; from a plain one that is not to be expected.
    config.uri.scheme() == "https" || server == "https"
}

fn advice(status: StatusCode, from_catalog: bool) -> Option<&'static str> {
    match status.as_u16() {
        401 | TOKEN_EXPIRED => Some("check catalog.token, catalog.credential or catalog.sigv4"),
        403 => Some("grant the principal that Floe uses the right to this, or use another one"),
        404 if !from_catalog => Some("this is not the answer of an Iceberg REST catalog; check catalog.uri"),
        300..=399 => Some("the catalog is elsewhere; set catalog.uri to that"),
        _ => None,
    }
}

/// `namespaces/<namespace>`
pub fn namespace_path(table: &TableName) -> String {
    let parts: Vec<String> = table.namespace.split('.').map(encode).collect();
    // The unit separator stands between the levels of a namespace.
    format!("namespaces/{}", parts.join("%1F"))
}

/// `namespaces/<namespace>/tables/<table>`
pub fn table_path(table: &TableName) -> String {
    format!("{}/tables/{}", namespace_path(table), encode(&table.name))
}
