//! Names of things in files and on the command line: one way to print them and to parse them.
//!
//! [`named!`](crate::named) gives them to an enum, in this crate and in those above it. A name that
//! does not exist is [`Error::UnknownName`](crate::Error::UnknownName), which lists the names that
//! do.

#[doc(hidden)]
pub use serde;

/// Gives an enum its names: `Display`, `FromStr` and serde as a string. Fieldless enums also get
/// `ALL` and `name`. A variant with one field is written `name:value`; the others are in `PLAIN`.
///
/// ```
/// #[derive(Debug, Clone, Copy, PartialEq)]
/// enum Cache { Exact, Half }
/// bitnet_core::named!(Cache, "cache type", { Exact = "exact", Half = "half" });
/// assert_eq!("half".parse(), Ok(Cache::Half));
/// assert_eq!(Cache::ALL.len(), 2);
///
/// #[derive(Debug, Clone, Copy, PartialEq)]
/// enum Limit { None, Rows(usize) }
/// bitnet_core::named!(
///     Limit, "limit", { None = "none" }, { Rows { 0: usize } = "rows": "N" if |&n| n > 0 }
/// );
/// assert_eq!("rows:3".parse(), Ok(Limit::Rows(3)));
/// assert_eq!(
///     "rows:0".parse::<Limit>().unwrap_err().to_string(),
///     "unknown limit 'rows:0', expected one of none, rows:N"
/// );
/// ```
#[macro_export]
macro_rules! named {
    ($type:ident, $what:literal, { $($variant:ident = $name:literal),+ $(,)? }) => {
        impl $type {
            /// All of them.
            pub const ALL: &'static [Self] = &[$(Self::$variant),+];

            /// The name in files and on the command line.
            pub const fn name(self) -> &'static str {
                match self { $(Self::$variant => $name),+ }
            }
        }

        impl ::std::fmt::Display for $type {
            fn fmt(&self, f: &mut ::std::fmt::Formatter<'_>) -> ::std::fmt::Result {
                f.pad(self.name())
            }
        }

        impl ::std::str::FromStr for $type {
            type Err = $crate::Error;
            fn from_str(s: &str) -> $crate::Result<Self> {
                match s {
                    $($name => Ok(Self::$variant),)+
                    _ => Err($crate::Error::UnknownName {
                        what: $what,
                        got: s.into(),
                        expected: [$($name),+].join(", "),
                    }),
                }
            }
        }

        $crate::as_string!($type);
    };
    ($type:ident, $what:literal, { $($variant:ident = $name:literal),+ $(,)? }, {
        $($valued:ident { $field:tt: $value:ty } = $prefix:literal: $letter:literal
            $(if $check:expr)?),+ $(,)?
    }) => {
        impl $type {
            /// The variants without a value.
            pub const PLAIN: &'static [Self] = &[$(Self::$variant),+];
        }

        impl ::std::fmt::Display for $type {
            fn fmt(&self, f: &mut ::std::fmt::Formatter<'_>) -> ::std::fmt::Result {
                match self {
                    $(Self::$variant => f.pad($name),)+
                    $(Self::$valued { $field: value } => {
                        f.pad(&format!(concat!($prefix, ":{}"), value))
                    })+
                }
            }
        }

        impl ::std::str::FromStr for $type {
            type Err = $crate::Error;
            fn from_str(s: &str) -> $crate::Result<Self> {
                let found = match s.split_once(':') {
                    None => match s {
                        $($name => Some(Self::$variant),)+
                        _ => None,
                    },
                    $(Some(($prefix, value)) => value
                        .parse::<$value>()
                        .ok()
                        $(.filter($check))?
                        .map(|value| Self::$valued { $field: value }),)+
                    Some(_) => None,
                };
                found.ok_or_else(|| $crate::Error::UnknownName {
                    what: $what,
                    got: s.into(),
                    expected: [$($name,)+ $(concat!($prefix, ":", $letter)),+].join(", "),
                })
            }
        }

        $crate::as_string!($type);
    };
}

/// serde through `Display` and `FromStr`.
#[macro_export]
macro_rules! as_string {
    ($type:ident) => {
        impl $crate::names::serde::Serialize for $type {
            fn serialize<S: $crate::names::serde::Serializer>(
                &self,
                serializer: S,
            ) -> ::std::result::Result<S::Ok, S::Error> {
                serializer.collect_str(self)
            }
        }

        impl<'de> $crate::names::serde::Deserialize<'de> for $type {
            fn deserialize<D: $crate::names::serde::Deserializer<'de>>(
                deserializer: D,
            ) -> ::std::result::Result<Self, D::Error> {
                let name: ::std::borrow::Cow<'_, str> =
                    $crate::names::serde::Deserialize::deserialize(deserializer)?;
                name.parse()
                    .map_err($crate::names::serde::de::Error::custom)
            }
        }
    };
}
