"""What is certified of a champion that answers deletion requests: for a file and for people, without forgotten text."""

import html
from collections.abc import Mapping
from typing import Any

from components.console import number
from components.html_page import html_table, page

_TITLES = {"original": "before", "unlearned": "after", "retain-only": "never trained on it"}
_METRICS = {
    "probability": "probability of the right answer",
    "rouge": "overlap of the model's answer with the right one (ROUGE-L)",
    "exact_match": "answers given word for word",
    "extraction_strength": "share of an answer that its beginning brings back",
}
_GATES = {
    "forget_quality": "chance that a test cannot tell it from a model never trained on the records (forget_quality)",
    "model_utility": "how well it answers everything else, from 0 to 1 (model_utility)",
    "forget_probability": "probability of the answers to be forgotten (forget_probability)",
}
NOT_GUARANTEED = (
    "The figures show how the model answers the questions that were asked. They do not prove that no trace is left in "
    "its parameters: other wordings, further training on similar text, or access to the weights may bring parts back. "
    "Copies of the earlier model, and of the records themselves in other systems, are not touched by unlearning. Row "
    "hashes are short digests of prompt and answer; whoever holds a record can tell whether it is meant."
)
_STYLE = """body { font: 16px/1.55 Georgia, serif; max-width: 46rem; }
td + td { font-variant-numeric: tabular-nums; }"""


def certificate_of(
    name: str, entry: Mapping[str, Any], gates: Mapping[str, Any], requests: Mapping[str, Any],
    purged: Mapping[str, Any] | None,
) -> dict[str, Any]:  # fmt: skip
    """The record of a promotion: each request with its rows and figures, the model before and after, and the gates."""
    return {
        "model": name,
        "version": entry["version"],
        "replaces": entry["replaces"],
        "promoted": {
            "time": entry["time"], "by": entry["actor"], "reason": entry["reason"], "ledger_entry": entry["seq"]
        },
        "files_sha256": entry["manifest"],
        "trained_by_run": entry["run"],
        "models": requests["models"],
        "requests_file_sha256": requests["file"],
        "requests": requests["requests"],
        "gates": gates["gates"],
        "gates_sha256": entry["gates"],
        "purged": purged,
        "not_guaranteed": NOT_GUARANTEED,
    }  # fmt: skip


def certificate_page(about: Mapping[str, Any]) -> str:
    """The certificate as one HTML page to read and to print."""
    promoted = about["promoted"]
    replaced = f", in place of version {about['replaces']}" if about["replaces"] else ""
    blocks = [
        f"<h1>Certificate of unlearning: {html.escape(about['model'])}, version {about['version']}</h1>",
        f"<p>On {promoted['time']} {html.escape(promoted['by'])} made version {about['version']} of the model "
        f"“{html.escape(about['model'])}” the one in use{replaced}. It was trained to forget the records that the "
        "requests below name.</p>",
        f"<p>Reason given: {html.escape(promoted['reason'])}</p>" if promoted["reason"] else "",
        *(_request(request) for request in about["requests"]),
        "<h2>Conditions that the model had to meet</h2>",
        html_table(
            [["measure", "value", "condition", "bound", "met"]],
            [
                [
                    _GATES.get(g["metric"], g["metric"]),
                    number(g["value"]),
                    g["condition"],
                    number(g["bound"]),
                    "yes" if g["passed"] else "no",
                ]
                for g in about["gates"]
            ],
        ),
        "<h2>What was removed besides</h2>" + _purged(about["purged"]),
        f"<h2>What this does not guarantee</h2><p>{about['not_guaranteed']}</p>",
        "<h2>Digests</h2>",
        html_table(
            [],
            [
                ["files of this version, sha256 of their list", about["files_sha256"]],
                *([f"model {_TITLES.get(name, name)}", digest] for name, digest in about["models"].items()),
                ["requests, sha256 of the file", about["requests_file_sha256"]],
                ["conditions, sha256 of the record", about["gates_sha256"]],
                ["ledger entry", str(promoted["ledger_entry"])],
                ["training run", about["trained_by_run"]],
            ],
        ),
    ]
    return page(f"{about['model']} {about['version']}", blocks, _STYLE)


def _request(request: Mapping[str, Any]) -> str:
    models = [name for name in _TITLES if name in request["metrics"]]
    figures = [
        [told, *(number(request["metrics"][model].get(metric)) for model in models)]
        for metric, told in _METRICS.items()
        if any(metric in request["metrics"][model] for model in models)
    ]
    count, asked = len(request["rows"]), len(request["asked_rows"])
    measured = (
        f"<p>Measured on {asked} questions about them:</p>" + html_table([["", *(_TITLES[m] for m in models)]], figures)
        if figures
        else "<p>No question about them was asked.</p>"
    )
    head = f"<h2>Request {html.escape(request['request_id'])}</h2>"
    basis = f", {html.escape(request['legal_basis'])}" if request["legal_basis"] else ""
    received = f"<p>Received {html.escape(request['received'])}{basis}.</p>"
    if not count:
        return f"{head}{received}<p><strong>No record was found that this request names.</strong></p>"
    hashes = f"<details><summary>Their hashes</summary><p>{', '.join(request['rows'])}</p></details>"
    return f"{head}{received}<p>{count} rows of training text were unlearned.</p>{measured}{hashes}"


def _purged(purged: Mapping[str, Any] | None) -> str:
    if purged is None:
        return "<p>Nothing: removing what training left behind was not asked for.</p>"
    kinds = (("No more in the storage folder", purged["gone"]), ("Not removed", purged["left"]))
    return "".join(
        f"<p>{told}:</p><ul>{''.join(f'<li>{html.escape(item)}</li>' for item in items)}</ul>"
        for told, items in kinds
        if items
    )
