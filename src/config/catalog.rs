//! Which catalog, where it is, and how it is asked.

use std::collections::BTreeMap;
use std::fmt;
use std::path::PathBuf;

use reqwest::header::{HeaderName, HeaderValue};
use url::Url;

use super::build::check_location;
use super::read::Reader;
use super::registry::http_url;

#[derive(Clone, Debug)]
pub enum CatalogConfig {
    Sqlite { path: PathBuf, warehouse: String },
    Rest(Box<RestConfig>),
}

#[derive(Clone)]
pub struct RestConfig {
    /// `http` or `https`, ending in a slash, without `v1`.
    pub uri: Url,
    /// What the server calls it; not every server has several.
    pub warehouse: Option<String>,
    pub auth: RestAuth,
    /// Sent with every request to the catalog. May hold secrets.
    pub headers: BTreeMap<String, String>,
    /// Certificates, PEM, that are trusted besides the system's.
    pub ca_file: Option<PathBuf>,
}

#[derive(Clone)]
pub enum RestAuth {
    None,
    Token(String),
    /// OAuth2 client credentials.
    Client {
        id: Option<String>,
        secret: String,
        scope: String,
        /// None: `v1/oauth/tokens` of the catalog itself.
        server: Option<Url>,
    },
    /// AWS Signature Version 4, with the keys of the environment.
    SigV4 {
        region: Option<String>,
        /// `glue`, `s3tables`, `execute-api`.
        service: String,
    },
}

impl RestAuth {
    /// For messages.
    pub fn name(&self) -> &'static str {
        match self {
            RestAuth::None => "none",
            RestAuth::Token(_) => "token",
            RestAuth::Client { .. } => "OAuth2 client credentials",
            RestAuth::SigV4 { .. } => "SigV4",
        }
    }
}

impl fmt::Debug for RestAuth {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            RestAuth::None | RestAuth::Token(_) => f.write_str(self.name()),
            RestAuth::Client { id, secret: _, scope, server } => {
                let server = server.as_ref().map(Url::as_str);
                write!(f, "{} {id:?} scope {scope:?} server {server:?}", self.name())
            }
            RestAuth::SigV4 { region, service } => write!(f, "{} region {region:?} service {service:?}", self.name()),
        }
    }
}

impl fmt::Debug for RestConfig {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("RestConfig")
            .field("uri", &self.uri.as_str())
            .field("warehouse", &self.warehouse)
            .field("auth", &self.auth)
            .field("headers", &self.headers.keys().collect::<Vec<_>>())
            .field("ca_file", &self.ca_file)
            .finish()
    }
}

const REST_ONLY: [&str; 10] = [
    "catalog.uri",
    "catalog.token",
    "catalog.credential",
    "catalog.scope",
    "catalog.oauth2_server_uri",
    "catalog.headers",
    "catalog.ca_file",
    "catalog.sigv4",
    "catalog.signing_region",
    "catalog.signing_name",
];

pub fn catalog(r: &mut Reader<'_>) -> Option<CatalogConfig> {
    match r.text("catalog.type").as_deref() {
        Some("sqlite") => {
            for key in REST_ONLY {
                if r.has(key) {
                    r.error(key, "has no meaning without catalog.type = \"rest\"");
                }
            }
            let path = r.text("catalog.path");
            let warehouse = r.text("catalog.warehouse");
            check_location(r, "catalog.warehouse", warehouse.as_deref());
            if path.as_ref().is_some_and(|p| p.is_empty()) {
                r.error("catalog.path", "is empty; allowed is the path of the SQLite file");
            }
            Some(CatalogConfig::Sqlite { path: PathBuf::from(path?), warehouse: warehouse? })
        }
        Some("rest") => {
            if r.has("catalog.path") {
                r.error("catalog.path", "is for catalog.type = \"sqlite\"; a REST catalog has catalog.uri");
            }
            r.required("catalog.uri");
            let uri = url(r, "catalog.uri");
            // The default is a folder, for the embedded catalog.
            let warehouse = if r.has("catalog.warehouse") { r.text("catalog.warehouse") } else { None };
            let auth = auth(r);
            let headers = headers(r);
            let ca_file = r.text("catalog.ca_file").map(PathBuf::from);
            if let Some(file) = ca_file.as_ref().filter(|file| !file.is_file()) {
                r.error("catalog.ca_file", format!("{} is no file", file.display()));
            }
            Some(CatalogConfig::Rest(Box::new(RestConfig { uri: uri?, warehouse, auth, headers, ca_file })))
        }
        Some(other) => {
            r.error("catalog.type", format!("found {other:?}, allowed are \"sqlite\", \"rest\""));
            None
        }
        None => None,
    }
}

fn auth(r: &mut Reader<'_>) -> RestAuth {
    let (token, credential) = (r.text("catalog.token"), r.text("catalog.credential"));
    let sigv4 = r.boolean("catalog.sigv4").unwrap_or(false);
    if u8::from(token.is_some()) + u8::from(credential.is_some()) + u8::from(sigv4) > 1 {
        r.error("catalog", "catalog.token, catalog.credential and catalog.sigv4 exclude each other; keep one");
    }
    let (scope, server) = (r.text("catalog.scope"), url(r, "catalog.oauth2_server_uri"));
    if credential.is_none() {
        for key in ["catalog.scope", "catalog.oauth2_server_uri"] {
            if r.has(key) {
                r.error(key, "has no meaning without catalog.credential");
            }
        }
    }
    if !sigv4 {
        for key in ["catalog.signing_region", "catalog.signing_name"] {
            if r.has(key) {
                r.error(key, "has no meaning without catalog.sigv4 = true");
            }
        }
    }
    match (token, credential) {
        (Some(token), _) => {
            if HeaderValue::from_str(&token).is_err() {
                r.error("catalog.token", "holds characters that no HTTP header may have, such as the end of a line");
            }
            RestAuth::Token(token)
        }
        (None, Some(credential)) => {
            let (id, secret) = match credential.split_once(':') {
                Some((id, secret)) => (Some(id.to_string()), secret.to_string()),
                None => (None, credential),
            };
            // A token's end is a URL, which takes no slash at its end.
            let server = server.and_then(|url| Url::parse(url.as_str().trim_end_matches('/')).ok());
            RestAuth::Client { id, secret, scope: scope.unwrap_or_default(), server }
        }
        (None, None) if sigv4 => RestAuth::SigV4 {
            region: r.text("catalog.signing_region"),
            service: r.text("catalog.signing_name").unwrap_or_default(),
        },
        (None, None) => RestAuth::None,
    }
}

fn headers(r: &mut Reader<'_>) -> BTreeMap<String, String> {
    let headers = r.map("catalog.headers");
    for (name, value) in &headers {
        if HeaderName::from_bytes(name.as_bytes()).is_err() || HeaderValue::from_str(value).is_err() {
            r.error("catalog.headers", format!("{name:?} is no HTTP header, or its value is none"));
        }
    }
    headers.into_iter().collect()
}

/// Ends in a slash. Messages do not quote it: people put passwords into URLs.
fn url(r: &mut Reader<'_>, key: &str) -> Option<Url> {
    let text = r.text(key)?;
    let allowed = "allowed is http://host:port/path or https://host:port/path";
    let mut url = http_url(r, key, &text, allowed)?;
    if !url.username().is_empty() || url.password().is_some() || url.query().is_some() || url.fragment().is_some() {
        r.error(key, format!("has a user name, a query or a fragment; {allowed}"));
        return None;
    }
    let path = url.path().trim_end_matches('/').to_string();
    let path = if key == "catalog.uri" { path.strip_suffix("/v1").unwrap_or(&path).to_string() } else { path };
    url.set_path(&format!("{path}/"));
    Some(url)
}
