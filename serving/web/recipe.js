// A picture's parameters as a program that draws it again.

/** The fields of a request that draws a picture of the history again; `images` and `mask` are the files of an edit. */
export function requestOf({ request, seed, model, size }) {
  return { ...request, model: model ?? request.model, seed, size: size ?? request.size };
}

const quoted = (text) => `'${text.replaceAll("'", `'\\''`)}'`;

/**
 * For a POSIX shell; the picture lies in picture.png afterwards. The key itself is never in it. The files of an
 * edit are taken from the current folder.
 */
export function asCurl(body, { root, needsKey }) {
  const { images, mask, ...fields } = body;
  const path = images ? "edits" : "generations";
  const lines = [`curl --silent --show-error --fail-with-body ${quoted(`${root}v1/images/${path}`)}`];
  if (needsKey) lines.push(`  --header "Authorization: Bearer $DIFFRAY_KEY"`);
  if (images) {
    const given = Object.entries(fields).filter(([, value]) => value !== undefined);
    lines.push(...given.map(([name, value]) => `  --form-string ${quoted(`${name}=${value}`)}`));
    const files = [...images.map((image) => ["image[]", image]), ...(mask ? [["mask", mask]] : [])];
    for (const [field, { name }] of files)
      lines.push(`  --form ${quoted(`${field}=@"${name.replace(/["\\]/g, "\\$&")}"`)}`);
  } else lines.push(`  --header 'Content-Type: application/json'`, `  --data ${quoted(JSON.stringify(body))}`);
  const decode = `  | sed 's/.*"b64_json":"\\([^"]*\\)".*/\\1/' | base64 --decode > picture.png`;
  return `${lines.join(" \\\n")} \\\n${decode}\n`;
}

/** For OpenAI's Python client. */
export function asPython(body, { root, needsKey }) {
  const { images, mask, prompt, model, size, ...ours } = body;
  const literal = (value) => JSON.stringify(value); // of strings and numbers: Python reads them alike
  const named = Object.entries({ prompt, model, size }).filter(([, value]) => value !== undefined);
  const extra = Object.entries(ours).map(([name, value]) => `${literal(name)}: ${literal(value)}`);
  return [
    "import base64",
    ...(needsKey ? ["import os"] : []),
    "from pathlib import Path",
    "",
    "from openai import OpenAI",
    "",
    `client = OpenAI(base_url=${literal(`${root}v1`)}, api_key=${needsKey ? 'os.environ["DIFFRAY_KEY"]' : '"none"'})`,
    `answer = client.images.${images ? "edit" : "generate"}(`,
    ...(images ? [`    image=[${images.map(({ name }) => `open(${literal(name)}, "rb")`).join(", ")}],`] : []),
    ...(mask ? [`    mask=open(${literal(mask.name)}, "rb"),`] : []),
    ...named.map(([name, value]) => `    ${name}=${literal(value)},`),
    `    extra_body={${extra.join(", ")}},`,
    ")",
    'Path("picture.png").write_bytes(base64.b64decode(answer.data[0].b64_json))',
    "",
  ].join("\n");
}
