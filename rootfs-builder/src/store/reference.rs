//! How users name images.

use oci_spec::distribution::Reference as FullReference;

use super::Error;
use super::index::Index;
use crate::oci::Digest;

/// Fewer digits are rather a name.
const SHORTEST_PREFIX: usize = 6;

/// A name in full, and the digits of a digest if it could be one.
pub(super) struct Reference {
    given: String,
    name: Option<String>,
    prefix: Option<String>,
}

impl Reference {
    pub(super) fn parse(given: &str) -> Result<Self, Error> {
        let digits = given.strip_prefix("sha256:").unwrap_or(given);
        let is_digest = (SHORTEST_PREFIX..=64).contains(&digits.len())
            && digits.bytes().all(|byte| matches!(byte, b'0'..=b'9' | b'a'..=b'f'));
        let name = normalise(given);
        let name = if is_digest { name.ok() } else { Some(name?) };
        Ok(Self { given: given.into(), name, prefix: is_digest.then(|| digits.into()) })
    }

    /// The name in full.
    pub(super) fn name(&self) -> Option<&str> {
        self.name.as_deref()
    }

    /// The image of that name, or else of that digest.
    pub(super) fn find(&self, index: &Index) -> Result<Digest, Error> {
        let named = index
            .images
            .iter()
            .find(|(_, image)| self.name.as_ref().is_some_and(|name| image.names.contains(name)));
        if let Some((digest, _)) = named {
            return Ok(digest.clone());
        }
        let begins = |digest: &&Digest| {
            self.prefix.as_ref().is_some_and(|prefix| digest.hex().starts_with(prefix.as_str()))
        };
        let found: Vec<&Digest> = index.images.keys().filter(begins).collect();
        match found.as_slice() {
            [] => Err(Error::Unknown { name: self.given.clone() }),
            [digest] => Ok((*digest).clone()),
            several => Err(Error::Ambiguous { prefix: self.given.clone(), count: several.len() }),
        }
    }
}

/// The full form of a name: `debian` is `docker.io/library/debian:latest`.
pub(super) fn normalise(name: &str) -> Result<String, Error> {
    let parsed: FullReference = name.parse().map_err(|source| Error::Name { name: name.into(), source })?;
    Ok(parsed.whole())
}

#[cfg(test)]
mod tests {
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
        }
    }

    #[test]
    fn digits_can_be_a_name_or_a_digest() {
        let reference = Reference::parse("abcdef").unwrap();
        assert_eq!(reference.name(), Some("docker.io/library/abcdef:latest"));
        assert_eq!(reference.prefix.as_deref(), Some("abcdef"));
        assert_eq!(Reference::parse("abc").unwrap().prefix, None);
        assert_eq!(Reference::parse("abcdeg").unwrap().prefix, None);
        let whole = Digest::of(b"").to_string();
        assert_eq!(Reference::parse(&whole).unwrap().prefix, Some(Digest::of(b"").hex()));
    }
}
