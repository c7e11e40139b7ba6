"""ServerApp without a strategy: it pushes questions and polls for the answers."""

import json
import time

import numpy as np
from flwr.app import ArrayRecord, Context, Message, RecordDict
from flwr.serverapp import Grid, ServerApp

app = ServerApp()


@app.main()
def main(grid: Grid, context: Context) -> None:
    """Ask for sums and extremes at once, then for a histogram between the extremes."""
    timeout = context.run_config["timeout"]
    while len(node_ids := sorted(grid.get_node_ids())) < context.run_config["min-nodes"]:
        time.sleep(1)

    # Two questions per node are under way at the same time
    messages = ask(node_ids, "query") + ask(node_ids, "query.extremes")
    by_kind = {"query": [], "query.extremes": []}
    for reply in push_and_poll(grid, messages, timeout):
        by_kind[reply.metadata.message_type].append(reply.content)
    sums = [content["answer"] for content in by_kind["query"]]
    ends = [content["answer"] for content in by_kind["query.extremes"]]
    about = {(content["about"]["feature"], content["about"]["asked"]) for content in by_kind["query.extremes"]}

    count = sum(answer["count"] for answer in sums)
    mean = sum(answer["sums"][0] for answer in sums) / count
    variance = sum(answer["sums"][1] for answer in sums) / count - mean**2
    low, high = min(answer["min"] for answer in ends), max(answer["max"] for answer in ends)

    edges = np.linspace(low, high, context.run_config["bins"] + 1)
    messages = ask(node_ids, "query.histogram", RecordDict({"edges": ArrayRecord([edges])}))
    replies = push_and_poll(grid, messages, timeout)
    counts = [reply.content["counts"].to_numpy_ndarrays()[0] for reply in replies if reply.has_content()]

    summary = {
        "nodes": len(node_ids),
        "count": count,
        "mean": round(mean, 6),
        "variance": round(variance, 6),
        "range": [low, high],
        "about": sorted(about),
        "histogram": np.sum(counts, axis=0).tolist(),
        "refusals": sum(reply.has_error() for reply in replies),
    }
    print("RESULT " + json.dumps(summary), flush=True)


def ask(node_ids: list[int], question: str, content: RecordDict | None = None) -> list[Message]:
    """Return one message per node."""
    content = content or RecordDict()
    return [Message(content=content, message_type=question, dst_node_id=node_id) for node_id in node_ids]


def push_and_poll(grid: Grid, messages: list[Message], timeout: float) -> list[Message]:
    """Push all messages and poll until each has its reply."""
    waiting = set(grid.push_messages(messages))
    replies = []
    end = time.time() + timeout
    while waiting:
        for reply in grid.pull_messages(list(waiting)):
            waiting.remove(reply.metadata.reply_to_message_id)
            replies.append(reply)
        if time.time() > end:
            raise TimeoutError(f"{len(waiting)} replies are missing")
        time.sleep(0.1)
    return replies
