//! Where the schema registry is and how it is asked.

use std::fmt;

use url::Url;

use super::read::Reader;

#[derive(Clone)]
pub struct RegistryConfig {
    /// `http` or `https`, ending in a slash. May hold credentials: shown through [`RegistryConfig::place`] only.
    pub url: Url,
    /// Name and password, where they are not in the URL.
    pub credentials: Option<(String, Option<String>)>,
}

impl RegistryConfig {
    /// The URL without credentials.
    pub fn place(&self) -> String {
        let mut url = self.url.clone();
        // Fails for URLs without a host only, which are refused.
        let _ = (url.set_username(""), url.set_password(None));
        url.to_string()
    }
}

impl fmt::Debug for RegistryConfig {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let username = self.credentials.as_ref().map(|(name, _)| name);
        f.debug_struct("RegistryConfig")
            .field("url", &self.place())
            .field("username", &username)
            .finish_non_exhaustive()
    }
}

/// Messages never quote the URL, which may hold a password.
pub fn registry(r: &mut Reader<'_>) -> Option<RegistryConfig> {
    let (username, password) = (r.text("schema.registry_username"), r.text("schema.registry_password"));
    if password.is_some() && username.is_none() {
        r.error("schema.registry_password", "needs schema.registry_username");
    }
    let Some(text) = r.text("schema.registry") else {
        if username.is_some() {
            r.error("schema.registry_username", "needs schema.registry");
        }
        return None;
    };
    let allowed = "allowed is http://host:port or https://host:port, with a path where the registry has one";
    let mut url = http_url(r, "schema.registry", &text, allowed)?;
    if url.query().is_some() || url.fragment().is_some() {
        r.error("schema.registry", format!("has a query or a fragment; {allowed}"));
    }
    if username.is_some() && !url.username().is_empty() {
        r.error("schema.registry_username", "the URL of schema.registry has a user name already; remove one of them");
    }
    url.set_path(&format!("{}/", url.path().trim_end_matches('/')));
    Some(RegistryConfig { url, credentials: username.map(|name| (name, password)) })
}

/// A URL with `http` or `https`; messages do not quote it.
pub(super) fn http_url(r: &mut Reader<'_>, key: &str, text: &str, allowed: &str) -> Option<Url> {
    match Url::parse(text.trim()) {
        Ok(url) if matches!(url.scheme(), "http" | "https") => return Some(url),
        Ok(url) => r.error(key, format!("found {}:, {allowed}", url.scheme())),
        Err(e) => r.error(key, format!("is no URL: {e}; {allowed}")),
    }
    None
}
