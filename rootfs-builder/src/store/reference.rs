//! How users name images.

use oci_spec::distribution::Reference as FullReference;

use super::Error;
use super::index::Index;
use crate::excerpt::excerpt;
use crate::oci::Digest;

/// Fewer digits are rather a name.
const SHORTEST_PREFIX: usize = 6;
/// Where names without a domain are from, and what it was called once.
const DOCKER_HUB: &str = "docker.io";
const DOCKER_HUB_LEGACY: &str = "index.docker.io";

/// A name in full, and the digits of a digest if it could be one.
pub(super) struct Reference {
    given: String,
    name: String,
    prefix: Option<String>,
}

impl Reference {
    pub(super) fn new(given: &str) -> Self {
        let digits = given.strip_prefix("sha256:").unwrap_or(given);
        let is_digest = (SHORTEST_PREFIX..=64).contains(&digits.len())
            && digits.bytes().all(|byte| matches!(byte, b'0'..=b'9' | b'a'..=b'f'));
        Self { given: given.into(), name: complete(given), prefix: is_digest.then(|| digits.into()) }
    }

    /// The name in full.
    pub(super) fn name(&self) -> &str {
        &self.name
    }

    /// The image of that name, or else of that digest.
    pub(super) fn find(&self, index: &Index) -> Result<Digest, Error> {
        let named = index.images.iter().find(|(_, image)| image.names.contains(&self.name));
        if let Some((digest, _)) = named {
            return Ok(digest.clone());
        }
        let begins = |digest: &&Digest| {
            self.prefix.as_ref().is_some_and(|prefix| digest.hex().starts_with(prefix.as_str()))
        };
        let found: Vec<&Digest> = index.images.keys().filter(begins).collect();
        match found.as_slice() {
            [] if self.prefix.is_none() => {
                normalise(&self.given)?;
                Err(Error::Unknown { name: self.given.clone() })
            }
            [] => Err(Error::Unknown { name: self.given.clone() }),
            [digest] => Ok((*digest).clone()),
            several => Err(Error::Ambiguous { prefix: self.given.clone(), count: several.len() }),
        }
    }
}

/// What [`normalise`] makes of a name that is one, without a look at whether it is. For finding a name among normalised ones that is
/// enough, and the grammar's regular expression takes longer to compile than a virtual machine to boot.
fn complete(given: &str) -> String {
    let (name, digest) = given.split_once('@').map_or((given, None), |(name, digest)| (name, Some(digest)));
    let last = name.rfind('/').map_or(0, |slash| slash + 1);
    let tagged = digest.is_some() || name[last..].contains(':');
    let (domain, path) = match name.split_once('/') {
        Some((domain, path)) if domain.contains(['.', ':']) || domain == "localhost" => (domain, path),
        _ => (DOCKER_HUB, name),
    };
    let domain = if domain == DOCKER_HUB_LEGACY { DOCKER_HUB } else { domain };
    let library = if domain == DOCKER_HUB && !path.contains('/') { "library/" } else { "" };
    let tag = if tagged { "" } else { ":latest" };
    let digest = digest.map_or(String::new(), |digest| format!("@{digest}"));
    format!("{domain}/{library}{path}{tag}{digest}")
}

/// The full form of a name: `debian` is `docker.io/library/debian:latest`.
pub(super) fn normalise(name: &str) -> Result<String, Error> {
    let parsed: FullReference = name.parse().map_err(|source| Error::Name { name: excerpt(name), source })?;
    Ok(parsed.whole())
}

#[cfg(test)]
mod tests {
    use std::path::Path;

    use proptest::prelude::*;

    use super::*;

    #[test]
    fn names_are_completed_as_docker_does() {
        for (given, full) in [
            ("debian", "docker.io/library/debian:latest"),
            ("debian:13", "docker.io/library/debian:13"),
            ("org/app:1", "docker.io/org/app:1"),
            ("quay.io/org/app", "quay.io/org/app:latest"),
            ("localhost:5000/app:2", "localhost:5000/app:2"),
        ] {
            assert_eq!(normalise(given).unwrap(), full);
        }
        for wrong in ["", "UPPER", "a b", "app:", "../x", "https://x/y"] {
            assert!(matches!(normalise(wrong), Err(Error::Name { .. })), "{wrong}");
            let empty = Index::read(Path::new("/nonexistent")).unwrap();
            assert!(matches!(Reference::new(wrong).find(&empty), Err(Error::Name { .. })), "{wrong}");
        }
    }

    proptest! {
        #[test]
        fn completing_a_name_agrees_with_the_grammar(
            name in "((localhost|a|a\\.io|index\\.docker\\.io|docker\\.io)(:[0-9]{1,2})?/)?[a-z]{1,3}(/[a-z._-]{1,3}){0,2}(:[A-Za-z0-9._-]{1,3})?",
            digest in proptest::option::of("[0-9a-f]{64}"),
        ) {
            let name = digest.map_or(name.clone(), |digest| format!("{name}@sha256:{digest}"));
            if let Ok(full) = normalise(&name) {
                prop_assert_eq!(complete(&name), full);
            }
        }
    }

    #[test]
    fn digits_can_be_a_name_or_a_digest() {
        let reference = Reference::new("abcdef");
        assert_eq!(reference.name(), "docker.io/library/abcdef:latest");
        assert_eq!(reference.prefix.as_deref(), Some("abcdef"));
        assert_eq!(Reference::new("abc").prefix, None);
        assert_eq!(Reference::new("abcdeg").prefix, None);
        let whole = Digest::of(b"").to_string();
        assert_eq!(Reference::new(&whole).prefix, Some(Digest::of(b"").hex()));
    }
}
