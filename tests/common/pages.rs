//! The documentation as tests read it: its pages, and the fenced blocks and code spans in them.

use std::{fs, path::Path};

const ROOT: &str = env!("CARGO_MANIFEST_DIR");

/// The pages whose commands and configurations are tested.
pub const PAGES: [&str; 6] = [
    "README.md",
    "src/doc/clients.md",
    "src/doc/design.md",
    "src/doc/flags.md",
    "src/doc/operating.md",
    "tests/README.md",
];

/// A fenced block.
#[derive(Debug)]
pub struct Block {
    /// The page and the line of its fence.
    pub place: String,
    /// The word behind the opening fence.
    pub language: String,
    pub text: String,
}

/// The text of a file of the repository.
pub fn read(path: &str) -> String {
    fs::read_to_string(Path::new(ROOT).join(path)).unwrap_or_else(|e| panic!("{path}: {e}"))
}

/// Whether the repository has this file or folder.
pub fn exists(path: &str) -> bool {
    Path::new(ROOT).join(path).exists()
}

/// The fenced blocks of a page, and the text outside of them.
pub fn parse(page: &str) -> (Vec<Block>, String) {
    let (mut blocks, mut prose) = (Vec::<Block>::new(), String::new());
    let mut is_inside = false;
    for (number, line) in (1..).zip(read(page).lines()) {
        match (line.strip_prefix("```"), is_inside) {
            (Some(language), false) => {
                let (place, language) = (format!("{page}:{number}"), language.to_owned());
                blocks.push(Block { place, language, text: String::new() });
                is_inside = true;
            }
            (Some(_), true) => is_inside = false,
            (None, true) => blocks.last_mut().unwrap().text += &format!("{line}\n"),
            (None, false) => prose += &format!("{line}\n"),
        }
    }
    assert!(!is_inside, "{page}: a block without an end");
    (blocks, prose)
}

/// The blocks of all pages in one language.
pub fn blocks(language: &str) -> Vec<Block> {
    let all = PAGES.iter().flat_map(|page| parse(page).0);
    all.filter(|block| block.language == language).collect()
}

/// What stands between backticks in the prose of a page.
pub fn spans(page: &str) -> Vec<String> {
    let prose = parse(page).1;
    prose.split('`').skip(1).step_by(2).map(|span| span.replace('\n', " ")).collect()
}

/// The commands of a block for a shell: one for each line, without comments.
pub fn commands(text: &str) -> Vec<String> {
    let joined = text.replace("\\\n", " ");
    let lines = joined.lines().map(|line| line.split(" # ").next().unwrap().trim().to_owned());
    lines.filter(|line| !line.is_empty()).collect()
}

/// The cells of all rows of the tables in a page.
pub fn table_rows(page: &str) -> Vec<Vec<String>> {
    let prose = parse(page).1;
    let row = |line: &str| {
        let cells = line.strip_prefix("| ")?.strip_suffix('|')?;
        Some(cells.split(" |").map(|cell| cell.trim().to_owned()).collect())
    };
    prose.lines().filter_map(row).collect()
}

/// The rows that begin with a code span: its text, and the other cells.
pub fn rows(page: &str) -> Vec<(String, Vec<String>)> {
    let row = |mut cells: Vec<String>| {
        let name = cells.remove(0);
        Some((name.strip_prefix('`')?.trim_end_matches('`').to_owned(), cells))
    };
    table_rows(page).into_iter().filter_map(row).collect()
}
