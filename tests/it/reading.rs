//! The walk-throughs in `src/lib.rs`: each file that they name exists, and each function is in the file named before.

use std::{collections::HashSet, fs, path::PathBuf};

/// The most lines of both walk-throughs together.
const MOST_LINES: usize = 120;

#[test]
fn the_walk_throughs_name_existing_files_and_functions() {
    let source = PathBuf::from(env!("CARGO_MANIFEST_DIR")).join("src");
    let documentation = fs::read_to_string(source.join("lib.rs")).unwrap();
    let lines = documentation.lines().map_while(|line| line.strip_prefix("//!"));
    let walks = lines.skip_while(|line| *line != " # One RESERVE, file by file");
    let walks: Vec<_> = walks.take_while(|line| *line != " # In another swarm").collect();
    assert!(walks.contains(&" # One CONNECT, file by file"));
    assert!(walks.len() <= MOST_LINES, "{} lines", walks.len());

    let (mut files, mut functions) = (HashSet::new(), HashSet::new());
    let mut file = None;
    let text = walks.join("\n");
    // What stands between two backticks is at the odd places.
    for name in text.split('`').skip(1).step_by(2) {
        if name.ends_with(".rs") {
            let path = source.join(name);
            let code = fs::read_to_string(&path).unwrap_or_else(|_| panic!("there is no {name}"));
            file = Some((name, code));
            files.insert(name);
        } else {
            let (file, code) = file.as_ref().expect("a file is named first");
            let is_there =
                code.contains(&format!("fn {name}(")) || code.contains(&format!("fn {name}<"));
            assert!(is_there, "there is no function {name} in {file}");
            functions.insert((*file, name));
        }
    }
    assert!(files.len() >= 18 && functions.len() >= 30, "{files:?}, {functions:?}");
}
