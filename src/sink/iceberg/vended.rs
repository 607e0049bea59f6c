//! Storage settings and credentials that a catalog hands out along with a table.
//!
//! Owns: which of them goes for which location, and credentials that are replaced before they run out. They win over the
//! environment, which is what holds where a catalog says nothing. Does not own: asking the catalog ([`Reload`]).

use std::collections::{BTreeMap, HashMap};
use std::fmt;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use async_trait::async_trait;
use object_store::aws::{AmazonS3ConfigKey, AwsCredential};
use object_store::{CredentialProvider, ObjectStore};

use crate::sink::Error;

/// Credentials are replaced so long before they run out.
const AHEAD_MS: i64 = 5 * 60_000;

/// Asks the catalog again; what it says then comes through [`Vended::accept`].
#[async_trait]
pub trait Reload: fmt::Debug + Send + Sync {
    async fn reload(&self) -> Result<(), Error>;
}

/// By the location that they are for.
#[derive(Debug, Default)]
pub struct Vended(Mutex<BTreeMap<String, Place>>);

#[derive(Debug)]
struct Place {
    settings: Vec<(AmazonS3ConfigKey, String)>,
    keys: Option<Arc<Keys>>,
    /// By bucket.
    stores: HashMap<String, Arc<dyn ObjectStore>>,
}

impl Vended {
    /// Takes what the catalog says of the storage below `location`; without a word about it nothing is kept.
    pub fn accept(
        &self,
        location: &str,
        properties: &HashMap<String, String>,
        reload: impl FnOnce() -> Arc<dyn Reload>,
    ) {
        let (settings, credential) = (settings(properties), credential(properties));
        let mut places = lock(&self.0);
        if settings.is_empty() && credential.is_none() {
            places.remove(location);
            return;
        }
        if let Some(place) = places.get_mut(location)
            && place.settings == settings
            && place.keys.is_some() == credential.is_some()
        {
            if let (Some(keys), Some(credential)) = (&place.keys, credential) {
                *lock(&keys.current) = credential;
            }
            return;
        }
        let keys = credential.map(|credential| {
            Arc::new(Keys { current: Mutex::new(credential), reloading: tokio::sync::Mutex::new(()), reload: reload() })
        });
        places.insert(location.to_string(), Place { settings, keys, stores: HashMap::new() });
    }

    /// The store of `location`, which is in `bucket`. None: nothing was said of it.
    pub fn store(&self, location: &str, bucket: &str) -> object_store::Result<Option<Arc<dyn ObjectStore>>> {
        let mut places = lock(&self.0);
        // The longest prefix is the most special one.
        let found =
            places.iter_mut().filter(|(prefix, _)| covers(prefix, location)).max_by_key(|(prefix, _)| prefix.len());
        let Some((_, place)) = found else { return Ok(None) };
        if let Some(store) = place.stores.get(bucket) {
            return Ok(Some(store.clone()));
        }
        let keys = place.keys.clone().map(|keys| keys as Arc<dyn CredentialProvider<Credential = AwsCredential>>);
        let store = crate::storage::open_bucket(bucket, &place.settings, keys)?;
        place.stores.insert(bucket.to_string(), store.clone());
        Ok(Some(store))
    }
}

/// `s3://a/b` covers `s3://a/b/c`, not `s3://a/bc`. A catalog may also say `s3` for all there is.
fn covers(prefix: &str, location: &str) -> bool {
    let rest = location.strip_prefix(prefix.trim_end_matches('/'));
    rest.is_some_and(|rest| rest.is_empty() || rest.starts_with(['/', ':']))
}

fn settings(properties: &HashMap<String, String>) -> Vec<(AmazonS3ConfigKey, String)> {
    let mut settings = Vec::new();
    if let Some(endpoint) = properties.get("s3.endpoint") {
        settings.push((AmazonS3ConfigKey::Endpoint, endpoint.clone()));
        if endpoint.starts_with("http://") {
            settings.push((AmazonS3ConfigKey::Client(object_store::ClientConfigKey::AllowHttp), "true".to_string()));
        }
    }
    if let Some(region) = properties.get("s3.region").or_else(|| properties.get("client.region")) {
        settings.push((AmazonS3ConfigKey::Region, region.clone()));
    }
    if let Some(path_style) = properties.get("s3.path-style-access") {
        let virtual_hosted = !path_style.eq_ignore_ascii_case("true");
        settings.push((AmazonS3ConfigKey::VirtualHostedStyleRequest, virtual_hosted.to_string()));
    }
    settings
}

fn credential(properties: &HashMap<String, String>) -> Option<Current> {
    let credential = AwsCredential {
        key_id: properties.get("s3.access-key-id")?.clone(),
        secret_key: properties.get("s3.secret-access-key")?.clone(),
        token: properties.get("s3.session-token").cloned(),
    };
    let expires_ms = properties.get("s3.session-token-expires-at-ms").and_then(|ms| ms.parse().ok());
    Some(Current { credential: Arc::new(credential), expires_ms })
}

struct Keys {
    current: Mutex<Current>,
    reloading: tokio::sync::Mutex<()>,
    reload: Arc<dyn Reload>,
}

struct Current {
    credential: Arc<AwsCredential>,
    /// Milliseconds since the epoch.
    expires_ms: Option<i64>,
}

impl fmt::Debug for Keys {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Keys").field("expires_ms", &lock(&self.current).expires_ms).finish_non_exhaustive()
    }
}

impl Keys {
    fn left_ms(&self) -> Option<i64> {
        lock(&self.current).expires_ms.map(|at| at - jiff::Timestamp::now().as_millisecond())
    }
}

#[async_trait]
impl CredentialProvider for Keys {
    type Credential = AwsCredential;

    async fn get_credential(&self) -> object_store::Result<Arc<AwsCredential>> {
        if self.left_ms().is_some_and(|left| left < AHEAD_MS) {
            let _one_at_a_time = self.reloading.lock().await;
            if self.left_ms().is_some_and(|left| left < AHEAD_MS)
                && let Err(error) = self.reload.reload().await
            {
                if self.left_ms().is_some_and(|left| left <= 0) {
                    let source =
                        format!("the storage credentials have run out, and the catalog gives no others: {error}");
                    return Err(object_store::Error::Generic { store: "S3", source: source.into() });
                }
                tracing::warn!(%error, "the storage credentials run out soon, and the catalog gives no others yet");
            }
        }
        Ok(lock(&self.current).credential.clone())
    }
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

#[cfg(test)]
mod tests {
    use std::sync::Weak;

    use super::*;

    fn properties(pairs: &[(&str, &str)]) -> HashMap<String, String> {
        pairs.iter().map(|(k, v)| (k.to_string(), v.to_string())).collect()
    }

    #[derive(Debug)]
    struct Server {
        vended: Weak<Vended>,
        asked: Mutex<i64>,
        life_ms: i64,
    }

    impl Server {
        fn vend(self: &Arc<Server>) {
            let mut asked = lock(&self.asked);
            *asked += 1;
            let expires = (jiff::Timestamp::now().as_millisecond() + self.life_ms).to_string();
            let keys = properties(&[
                ("s3.access-key-id", &format!("key-{asked}")),
                ("s3.secret-access-key", "secret"),
                ("s3.session-token", "token"),
                ("s3.session-token-expires-at-ms", &expires),
                ("s3.region", "eu-north-1"),
            ]);
            self.vended.upgrade().unwrap().accept("s3://b/t", &keys, || Arc::new(Asked(self.clone())));
        }
    }

    #[derive(Debug)]
    struct Asked(Arc<Server>);

    #[async_trait]
    impl Reload for Asked {
        async fn reload(&self) -> Result<(), Error> {
            self.0.vend();
            Ok(())
        }
    }

    #[tokio::test]
    async fn keys_are_replaced_before_they_run_out() {
        for (life_ms, expected) in [(AHEAD_MS / 2, ["key-2", "key-3"]), (AHEAD_MS * 2, ["key-1", "key-1"])] {
            let vended = Arc::new(Vended::default());
            let server = Arc::new(Server { vended: Arc::downgrade(&vended), asked: Mutex::new(0), life_ms });
            server.vend();
            let keys = lock(&vended.0)["s3://b/t"].keys.clone().unwrap();
            for expected in expected {
                assert_eq!(keys.get_credential().await.unwrap().key_id, expected);
            }
            assert!(!format!("{vended:?}").contains("secret"), "{vended:?}");
        }
    }

    #[test]
    fn the_most_special_place_counts_and_silence_means_the_environment() {
        let vended = Vended::default();
        let keys = properties(&[("s3.region", "x"), ("s3.endpoint", "http://127.0.0.1:1")]);
        #[derive(Debug)]
        struct Never;
        #[async_trait]
        impl Reload for Never {
            async fn reload(&self) -> Result<(), Error> {
                Ok(())
            }
        }
        vended.accept("s3://b/t", &keys, || Arc::new(Never));
        vended.accept("s3://b/other", &properties(&[]), || Arc::new(Never));
        assert!(vended.store("s3://b/t/data/x", "b").unwrap().is_some());
        assert!(vended.store("s3://b/t2/data/x", "b").unwrap().is_none());
        assert!(vended.store("s3://b/other/x", "b").unwrap().is_none());
        vended.accept("s3", &keys, || Arc::new(Never));
        assert!(vended.store("s3://b/other/x", "b").unwrap().is_some());
        assert!(!covers("s3", "s3a/x") && covers("s3://b/", "s3://b/x"));
    }
}
