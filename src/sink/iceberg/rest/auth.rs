//! Who Floe is to a REST catalog: a token, OAuth2 client credentials, or a signature.
//!
//! Owns: the current access token and when it has to be replaced. Does not own: what a refusal means for a request
//! ([`super::client`]). Secrets are in headers marked sensitive and in no message.

use std::time::{Duration, Instant};

use object_store::aws::{AmazonS3Builder, AwsCredentialProvider};
use reqwest::header::{AUTHORIZATION, HeaderMap, HeaderName, HeaderValue};
use reqwest::{Method, StatusCode};
use serde::Deserialize;
use tokio::sync::Mutex;
use url::Url;

use super::client::cause;
use super::sigv4::{self, Signing};
use crate::config::{RestAuth, RestConfig};
use crate::sink::Error;

/// A token is replaced so long before it runs out, or after nine tenths of a shorter life.
const AHEAD: Duration = Duration::from_secs(60);

#[derive(Debug)]
pub enum Auth {
    None,
    Token(HeaderValue),
    Client(ClientCredentials),
    SigV4 { region: String, service: String, credentials: AwsCredentialProvider },
}

pub struct ClientCredentials {
    server: Url,
    form: String,
    current: Mutex<Option<AccessToken>>,
}

impl std::fmt::Debug for ClientCredentials {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("ClientCredentials").field("server", &self.server.as_str()).finish_non_exhaustive()
    }
}

struct AccessToken {
    header: HeaderValue,
    replace_at: Option<Instant>,
}

#[derive(Deserialize)]
struct TokenAnswer {
    access_token: String,
    /// Seconds.
    expires_in: Option<f64>,
}

#[derive(Deserialize)]
struct TokenRefusal {
    error: String,
    error_description: Option<String>,
}

impl Auth {
    pub fn new(config: &RestConfig) -> Result<Auth, Error> {
        Ok(match &config.auth {
            RestAuth::None => Auth::None,
            RestAuth::Token(token) => Auth::Token(bearer(token)?),
            RestAuth::Client { id, secret, scope, server } => {
                let server = match server {
                    Some(server) => server.clone(),
                    None => {
                        config.uri.join("v1/oauth/tokens").map_err(|e| Error::fatal(format!("catalog.uri: {e}")))?
                    }
                };
                let mut form = vec![("grant_type", "client_credentials"), ("client_secret", secret), ("scope", scope)];
                form.extend(id.as_ref().map(|id| ("client_id", id.as_str())));
                let encoded = form.iter().map(|(k, v)| format!("{k}={}", sigv4::encode(v)));
                let form = encoded.collect::<Vec<_>>().join("&");
                Auth::Client(ClientCredentials { server, form, current: Mutex::new(None) })
            }
            RestAuth::SigV4 { region, service } => {
                // The chain that the tables' storage uses too: variables, web identity, containers, instances.
                let mut builder = AmazonS3Builder::from_env().with_bucket_name("floe");
                if let Some(region) = region {
                    builder = builder.with_region(region);
                }
                let region = builder.get_config_value(&object_store::aws::AmazonS3ConfigKey::Region);
                let region = region.ok_or_else(|| {
                    Error::fatal("signed requests need a region: set catalog.signing_region or AWS_REGION")
                })?;
                let store = builder.build().map_err(|e| Error::fatal(format!("keys for catalog.sigv4: {e}")))?;
                Auth::SigV4 { region, service: service.clone(), credentials: store.credentials().clone() }
            }
        })
    }

    /// Whether a new token may be had for one that was refused.
    pub fn renews(&self) -> bool {
        matches!(self, Auth::Client(_))
    }

    /// The headers of one request. `refused` is a token that the server no longer takes.
    pub async fn headers(
        &self,
        http: &reqwest::Client,
        request: &Outgoing<'_>,
        refused: Option<&HeaderValue>,
    ) -> Result<HeaderMap, Error> {
        let mut headers = HeaderMap::new();
        match self {
            Auth::None => {}
            Auth::Token(token) => {
                headers.insert(AUTHORIZATION, token.clone());
            }
            Auth::Client(client) => {
                headers.insert(AUTHORIZATION, client.token(http, refused).await?);
            }
            Auth::SigV4 { region, service, credentials } => {
                let credential = credentials.get_credential().await.map_err(|e| {
                    Error::transient(format!("no AWS credentials to sign a request to the catalog with: {e}"))
                })?;
                let signing = Signing {
                    access_key_id: &credential.key_id,
                    secret_key: &credential.secret_key,
                    region,
                    service,
                    now_ms: jiff::Timestamp::now().as_millisecond(),
                };
                headers = sign(&signing, credential.token.as_deref(), request)?;
            }
        }
        Ok(headers)
    }
}

/// A request as far as its signature goes.
pub struct Outgoing<'a> {
    pub method: &'a Method,
    pub url: &'a Url,
    pub body: &'a [u8],
}

fn sign(signing: &Signing<'_>, token: Option<&str>, request: &Outgoing<'_>) -> Result<HeaderMap, Error> {
    let host = request.url.host_str().unwrap_or_default();
    let host = request.url.port().map_or(host.to_string(), |port| format!("{host}:{port}"));
    let mut signed = vec![
        ("host".to_string(), host),
        ("x-amz-content-sha256".to_string(), sigv4::sha256(request.body)),
        ("x-amz-date".to_string(), signing.date()),
    ];
    signed.extend(token.map(|token| ("x-amz-security-token".to_string(), token.to_string())));
    let query: Vec<(String, String)> =
        request.url.query_pairs().map(|(k, v)| (k.into_owned(), v.into_owned())).collect();
    let authorization = signing.authorization(&sigv4::Request {
        method: request.method.as_str(),
        path: request.url.path(),
        query: &query,
        headers: &signed,
        body: request.body,
    });
    signed.push(("authorization".to_string(), authorization));
    let mut headers = HeaderMap::new();
    // The client sets `host` by itself.
    for (name, value) in signed.into_iter().skip(1) {
        let failed = |e: &dyn std::fmt::Display| Error::fatal(format!("cannot sign a request to the catalog: {e}"));
        let name = HeaderName::from_bytes(name.as_bytes()).map_err(|e| failed(&e))?;
        let mut value = HeaderValue::from_str(&value).map_err(|e| failed(&e))?;
        value.set_sensitive(true);
        headers.insert(name, value);
    }
    Ok(headers)
}

fn bearer(token: &str) -> Result<HeaderValue, Error> {
    let mut header = HeaderValue::from_str(&format!("Bearer {token}"))
        .map_err(|_| Error::fatal("the catalog's token holds characters that no HTTP header may have"))?;
    header.set_sensitive(true);
    Ok(header)
}

impl ClientCredentials {
    async fn token(&self, http: &reqwest::Client, refused: Option<&HeaderValue>) -> Result<HeaderValue, Error> {
        // Whoever comes while a token is fetched waits for it.
        let mut current = self.current.lock().await;
        if let Some(token) = &*current
            && refused != Some(&token.header)
            && token.replace_at.is_none_or(|at| Instant::now() < at)
        {
            return Ok(token.header.clone());
        }
        let fetched = self.fetch(http).await?;
        let header = fetched.header.clone();
        *current = Some(fetched);
        Ok(header)
    }

    async fn fetch(&self, http: &reqwest::Client) -> Result<AccessToken, Error> {
        let asked = Instant::now();
        let server = &self.server;
        let no_answer = |e: reqwest::Error| {
            Error::transient(format!("OAuth2 server {server}: {}; is it reachable from here?", cause(e)))
        };
        let request = http
            .post(server.clone())
            .header("content-type", "application/x-www-form-urlencoded")
            .header("accept", "application/json")
            .body(self.form.clone());
        let answer = request.send().await.map_err(no_answer)?;
        let status = answer.status();
        let body = answer.bytes().await.map_err(no_answer)?;
        if status.is_success() {
            let token: TokenAnswer = serde_json::from_slice(&body).map_err(|_| {
                Error::fatal(format!(
                    "OAuth2 server {server}: the answer has no access token; check catalog.oauth2_server_uri"
                ))
            })?;
            let life = token.expires_in.and_then(|seconds| Duration::try_from_secs_f64(seconds).ok());
            let replace_at = life.map(|life| asked + life.saturating_sub(AHEAD.min(life / 10)));
            return Ok(AccessToken { header: bearer(&token.access_token)?, replace_at });
        }
        let why = serde_json::from_slice::<TokenRefusal>(&body).map(|r| match r.error_description {
            Some(description) => format!("{}: {description}", r.error),
            None => r.error,
        });
        let why = why.unwrap_or_else(|_| "no reason given".into());
        Err(if status.is_server_error() || status == StatusCode::TOO_MANY_REQUESTS {
            Error::transient(format!("OAuth2 server {server}: {status}: {why}"))
        } else {
            Error::fatal(format!(
                "OAuth2 server {server} gives no token: {status}: {why}; check catalog.credential, catalog.scope and catalog.oauth2_server_uri"
            ))
        })
    }
}
