// A request as a command that can be run as it stands: curl for a shell, and Python without any package.

/** A JSON value as Python writes it. JSON's strings are Python's. */
function python(value, indent = "") {
  const inner = `${indent}    `;
  if (value === null) return "None";
  if (value === true) return "True";
  if (value === false) return "False";
  if (Array.isArray(value)) return `[${value.map((item) => python(item, indent)).join(", ")}]`;
  if (typeof value === "object") {
    const members = Object.entries(value).map(([key, item]) => `${inner}${JSON.stringify(key)}: ${python(item, inner)},`);
    return `{\n${members.join("\n")}\n${indent}}`;
  }
  return JSON.stringify(value);
}

/** A command for a POSIX shell. withKey: whether the server asks for an API key. */
export function asCurl(url, body, withKey) {
  const json = JSON.stringify(body, null, 2).replaceAll("'", "'\\''");
  const key = withKey ? ' \\\n  -H "Authorization: Bearer $STET_API_KEY"' : "";
  return `curl -sN ${url} \\\n  -H 'Content-Type: application/json'${key} \\\n  -d '${json}'\n`;
}

/** A program for Python 3. */
export function asPython(url, body, withKey) {
  const imports = withKey ? "import json\nimport os\nimport urllib.request" : "import json\nimport urllib.request";
  const key = withKey ? `    "Authorization": "Bearer " + os.environ["STET_API_KEY"],\n` : "";
  const request = `request = urllib.request.Request("${url}", json.dumps(body).encode(), headers)`;
  const reading = body.stream
    ? `with urllib.request.urlopen(request) as answer:
    for line in answer:
        if line.startswith(b"data: {"):
            event = json.loads(line[6:])
            if event.get("index") == 0:
                print(event["text"], end="", flush=True)
print()`
    : `with urllib.request.urlopen(request) as answer:
    print(json.load(answer)["outputs"][0]["text"])`;
  return `${imports}

body = ${python(body)}
headers = {
    "Content-Type": "application/json",
${key}}
${request}
${reading}
`;
}
