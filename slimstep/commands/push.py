"""A student for a model hub, with a model card grown full from its run: scores, times, training, samples, licence.

    slimstep push runs/distill_steps/steps-1/export --repo USER/NAME --license apache-2.0 --folder DIR   # to look at
    slimstep push runs/distill_steps/steps-1/export --repo USER/NAME --license apache-2.0                # upload it

The first writes what the second uploads, by the account that `hf auth login` has stored, as a private repository unless
--public is given.
"""

import argparse
import sys
import tempfile
from pathlib import Path

from slimstep.engine.quiet import one_line


def main() -> int:
    """Writes or uploads the folder; returns the exit code, 1 where it cannot be."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("export", type=Path, metavar="EXPORT", help="an export in its run's folder")
    parser.add_argument("--repo", required=True, metavar="USER/NAME", help="what it is called on the hub")
    parser.add_argument("--license", help="as the hub names it; by default what the card of a local teacher says")
    parser.add_argument("--folder", type=Path, metavar="DIR", help="write here and upload nothing")
    parser.add_argument("--public", action="store_true", help="for all to see")
    options = parser.parse_args()
    from slimstep.eval.hub import ready_folder  # here, since --help needs none of it
    from slimstep.models.card import HUB_ID

    if not HUB_ID.fullmatch(options.repo):
        parser.error(f"--repo {options.repo} must be USER/NAME")
    try:
        if options.folder:
            ready_folder(options.export, options.folder, options.repo, options.license)
            print(options.folder.resolve())
        else:
            print(upload(options))
    except (OSError, ValueError) as error:  # the hub's errors are OSErrors
        print(f"error: {one_line(error)}", file=sys.stderr)
        return 1
    return 0


def upload(options: argparse.Namespace) -> str:
    """The address of the commit."""
    from huggingface_hub import HfApi

    from slimstep.eval.hub import ready_folder

    api = HfApi()
    with tempfile.TemporaryDirectory() as folder:
        ready = Path(folder) / "ready"
        ready_folder(options.export, ready, options.repo, options.license)
        api.create_repo(options.repo, private=not options.public, exist_ok=True)
        commit = api.upload_folder(repo_id=options.repo, folder_path=ready, commit_message="Upload by slimstep")
    return str(commit.commit_url)
