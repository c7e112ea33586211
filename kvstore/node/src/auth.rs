//! Who is who: bearer tokens bound to tenants, and what a connection may do.

use std::fs;
use std::os::unix::fs::PermissionsExt as _;
use std::path::Path;

use kvkeep_core::{Error, ErrorKind, Result};
use subtle::ConstantTimeEq as _;

/// Shortest token, in bytes.
const TOKEN_BYTES_MIN: usize = 16;
/// Longest token, in bytes.
const TOKEN_BYTES_MAX: usize = 1024;
/// Most tokens of one file.
const TOKENS_MAX: usize = 65_536;

/// What a caller is once it is known.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Identity {
    /// Name of its tenant.
    pub tenant: String,
    /// May ask [`crate::service::admin`].
    pub admin: bool,
}

impl Identity {
    /// The tenant of loopback and Unix-socket callers where no tokens are configured.
    pub fn default_admin() -> Self {
        Self { tenant: "default".into(), admin: true }
    }
}

/// The tokens of this node; none: everybody on loopback is [`Identity::default_admin`].
#[derive(Default)]
pub struct Tokens(Vec<(Box<[u8]>, Identity)>);

impl std::fmt::Debug for Tokens {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "Tokens({} of them)", self.0.len())
    }
}

impl Tokens {
    /// Reads `tenant token [admin]` lines; `#` starts a comment. Refuses a file that others may read.
    pub fn from_file(path: &Path) -> Result<Self> {
        let bad = |what: &'static str| Error::new(ErrorKind::Config, what).with("path", path.display());
        let mode = fs::metadata(path)
            .map_err(|e| bad("the tokens file cannot be read").with("cause", e))?
            .permissions()
            .mode();
        if mode & 0o077 != 0 {
            return Err(
                bad("the tokens file is readable by others: chmod 600").with("mode", format!("{:o}", mode & 0o777))
            );
        }
        let text = fs::read_to_string(path).map_err(|e| bad("the tokens file cannot be read").with("cause", e))?;
        Self::parse(&text).map_err(|e| e.with("path", path.display()))
    }

    /// Parses the text of a tokens file. Errors name the line, never the token.
    pub fn parse(text: &str) -> Result<Self> {
        let mut tokens = Vec::new();
        for (i, line) in text.lines().enumerate() {
            let bad = |what: &'static str| Error::new(ErrorKind::Config, what).with("line", i + 1);
            let line = line.split('#').next().unwrap_or_default();
            let mut words = line.split_whitespace();
            let Some(tenant) = words.next() else { continue };
            let token = words.next().ok_or_else(|| bad("a line is `tenant token [admin]`"))?;
            let admin = match words.next() {
                None => false,
                Some("admin") => true,
                Some(_) => return Err(bad("the third word can only be `admin`")),
            };
            if words.next().is_some() || tenant.len() > 64 {
                return Err(bad("a line is `tenant token [admin]`, the tenant at most 64 bytes"));
            }
            if !(TOKEN_BYTES_MIN..=TOKEN_BYTES_MAX).contains(&token.len()) {
                return Err(bad("a token has 16 to 1024 bytes"));
            }
            if tokens.len() == TOKENS_MAX {
                return Err(bad("a tokens file has at most 65536 tokens"));
            }
            tokens.push((token.as_bytes().into(), Identity { tenant: tenant.into(), admin }));
        }
        if tokens.is_empty() {
            return Err(Error::new(ErrorKind::Config, "the tokens file has no token"));
        }
        Ok(Self(tokens))
    }

    /// Names of the tenants that have a token.
    pub fn tenants(&self) -> impl Iterator<Item = &str> {
        self.0.iter().map(|(_, identity)| identity.tenant.as_str())
    }

    /// Whether any token is configured.
    pub fn is_empty(&self) -> bool {
        self.0.is_empty()
    }

    /// Who holds this token. Compares with every token in constant time.
    pub fn identify(&self, token: &[u8]) -> Option<&Identity> {
        let mut found = None;
        for (known, identity) in &self.0 {
            if bool::from(known.as_ref().ct_eq(token)) {
                found = Some(identity);
            }
        }
        found
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_token_names_its_tenant_and_nothing_else_does() {
        let t = Tokens::parse("# ours\nacme 0123456789abcdef\nops fedcba9876543210 admin # root\n").unwrap();
        assert_eq!(t.identify(b"0123456789abcdef").unwrap().tenant, "acme");
        assert!(t.identify(b"fedcba9876543210").unwrap().admin);
        assert!(t.identify(b"").is_none());
        assert!(t.identify(b"0123456789abcdeX").is_none());
    }

    #[test]
    fn a_bad_line_is_named_and_its_token_is_not() {
        for text in ["acme", "acme short", "acme 0123456789abcdef root", "", "acme 0123456789abcdef admin more"] {
            let e = Tokens::parse(text).unwrap_err().to_string();
            assert!(!e.contains("0123456789abcdef"), "{e}");
        }
    }
}
