//! Pages for operators and readers: the files of `src/doc/`. Only `cargo doc` compiles this module.

/// Modules whose documentation is a page each. Links between pages name files of the repository; here they become links to
/// modules, because of two definitions of a link the first one counts.
macro_rules! pages {
    ($($name:ident $file:literal)*) => {$(
        #[doc = "[flags]: flags\n[operating]: operating\n[clients]: clients\n[design]: design\n\n"]
        #[doc = include_str!($file)]
        pub mod $name {}
    )*};
}

pages!(flags "doc/flags.md" operating "doc/operating.md" clients "doc/clients.md" design "doc/design.md");
