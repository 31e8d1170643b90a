//! Man pages and completions, generated from the command line's definition.

use std::path::Path;

use clap::CommandFactory;

use crate::cli::{Cli, exit_code_table};
use crate::failure::{Failure, Result};

/// Writes the completions for `shell` to `out`.
pub fn completions(shell: clap_complete::Shell, out: &mut dyn std::io::Write) -> Result<()> {
    let mut text = Vec::new();
    clap_complete::generate(shell, &mut Cli::command(), "layerctl", &mut text);
    out.write_all(&text)?;
    Ok(())
}

/// Writes layerctl(1), a page for each command, and mount.layerfs(8) below `dir`; returns how many.
pub fn man(dir: &Path) -> Result<usize> {
    std::fs::create_dir_all(dir).map_err(|e| Failure::file("create", dir, e))?;
    let mut command = Cli::command();
    command.build();
    let mut pages = Vec::new();
    collect(&command, "layerctl", &mut pages);
    for (name, page) in &pages {
        write(&dir.join(format!("{name}.1")), page)?;
    }
    write(&dir.join("mount.layerfs.8"), MOUNT_LAYERFS.as_bytes())?;
    Ok(pages.len() + 1)
}

fn write(path: &Path, text: &[u8]) -> Result<()> {
    std::fs::write(path, text).map_err(|e| Failure::file("write", path, e))
}

fn collect(command: &clap::Command, name: &str, pages: &mut Vec<(String, Vec<u8>)>) {
    pages.push((name.to_owned(), page(command, name)));
    for below in command.get_subcommands().filter(|below| !below.is_hide_set() && below.get_name() != "help") {
        collect(below, &format!("{name}-{}", below.get_name()), pages);
    }
}

fn page(command: &clap::Command, name: &str) -> Vec<u8> {
    let named = command.clone().name(name.to_owned()).bin_name(name.replace('-', " ")).display_name(name.to_owned());
    let man = clap_mangen::Man::new(named).title(name.to_uppercase()).manual("layerfs").source("layerfs");
    let mut page = Vec::new();
    // Writing to memory cannot fail.
    let _ = man.render_title(&mut page);
    let _ = man.render_name_section(&mut page);
    let _ = man.render_synopsis_section(&mut page);
    let _ = man.render_description_section(&mut page);
    let _ = man.render_options_section(&mut page);
    if command.get_subcommands().any(|below| !below.is_hide_set()) {
        let _ = man.render_subcommands_section(&mut page);
    }
    if let Some(help) = command.get_after_help() {
        page.extend_from_slice(sections(&help.to_string()).as_bytes());
    }
    if name != "layerctl" {
        page.extend_from_slice(sections(&format!("Exit codes:\n{}", exit_code_table())).as_bytes());
    }
    let see = if name == "layerctl" { ".BR mount.layerfs (8)" } else { ".BR layerctl (1)" };
    page.extend_from_slice(format!(".SH \"SEE ALSO\"\n{see}\n").as_bytes());
    page
}

/// The sections of a help text's end in roff: lines that end in `:` at its left edge are headings, the rest stays as it is.
fn sections(text: &str) -> String {
    let mut out = String::new();
    let mut is_open = false;
    for line in text.lines() {
        match line.strip_suffix(':').filter(|heading| !heading.starts_with(' ') && heading.len() < 30) {
            Some(heading) => {
                out.push_str(if is_open { ".fi\n.RE\n" } else { "" });
                out.push_str(&format!(".SH {}\n.RS 0\n.nf\n", quote(&heading.to_uppercase())));
                is_open = true;
            }
            None => out.push_str(&format!("{}\n", roff(line))),
        }
    }
    out.push_str(if is_open { ".fi\n.RE\n" } else { "" });
    out
}

fn quote(text: &str) -> String {
    format!("\"{text}\"")
}

fn roff(line: &str) -> String {
    let escaped = line.replace('\\', "\\e").replace('-', "\\-");
    if escaped.starts_with(['.', '\'']) { format!("\\&{escaped}") } else { escaped }
}

/// The page of the mount helper, which has no command of its own.
const MOUNT_LAYERFS: &str = r#".TH MOUNT.LAYERFS 8 "" layerfs layerfs
.SH NAME
mount.layerfs \- mount a layer through mount(8) and fstab
.SH SYNOPSIS
.B mount \-t layerfs
.I NAME DIR
.RB [ \-o
.IR OPTIONS ]
.SH DESCRIPTION
.BR mount (8)
calls this program for file systems of the type
.BR layerfs .
It is
.BR layerctl (1)
under another name, and does what
.B layerctl mount
does.
.SH OPTIONS
.TP
.B ro
no changes; with
.BR upper= ,
what that upper has changed is seen
.TP
.BI upper= UPPER
keep the changes in the upper of this name; it is made if it does not exist
.TP
.BI store= PATH
the store's folder
.TP
.BI writeback= on|off
whether large files of lower layers have the kernel's writeback cache, where that can be had; on if nothing is said
.TP
.B remount
with
.B ro
or
.BR rw :
forbid or allow changes at this place from now on
.PP
nosuid, nodev, noexec, noatime, nodiratime and relatime have their usual meanings. Options for others, such as
.BR auto ,
.BR noauto ,
.BR user ,
.BR nofail ,
.B _netdev
and
.BR x\-* ,
are ignored.
.SH EXAMPLES
.nf
mount \-t layerfs debian /mnt \-o ro

# /etc/fstab
app  /srv/web  layerfs  upper=web,nofail,x-systemd.requires=layerfs.service  0  0
.fi
.SH "EXIT CODES"
Those of
.BR mount (8):
0 for success, 1 for wrong usage or missing rights, 32 for a mount that failed.
.SH "SEE ALSO"
.BR layerctl (1),
.BR mount (8),
.BR fstab (5)
"#;

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_command_has_a_page_with_examples_and_exit_codes() {
        let mut command = Cli::command();
        command.build();
        let mut pages = Vec::new();
        collect(&command, "layerctl", &mut pages);
        assert!(pages.len() > 30, "{}", pages.len());
        for (name, page) in pages {
            let text = String::from_utf8(page).unwrap();
            assert!(text.contains(".SH \"EXAMPLES\""), "{name} has no examples");
            assert!(text.contains(".SH \"EXIT CODES\""), "{name} has no exit codes");
        }
    }

    #[test]
    fn no_example_is_wider_than_a_terminal() {
        fn check(command: &clap::Command) {
            let help = command.get_after_help().map(ToString::to_string).unwrap_or_default();
            for line in help.lines() {
                assert!(line.chars().count() <= 96, "{}: {line}", command.get_name());
            }
            command.get_subcommands().for_each(check);
        }
        check(&Cli::command());
    }

    #[test]
    fn completions_know_the_commands() {
        let mut text = Vec::new();
        completions(clap_complete::Shell::Bash, &mut text).unwrap();
        let text = String::from_utf8(text).unwrap();
        assert!(text.contains("scrub") && text.contains("--read-only"));
    }
}
