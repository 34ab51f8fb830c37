// What the page shows of one job.
import { el } from "./dom.js";

export function duration(seconds) {
  if (seconds < 5) return "a few seconds left";
  if (seconds < 100) return `about ${Math.round(seconds)} s left`;
  if (seconds < 6000) return `about ${Math.round(seconds / 60)} min left`;
  return `about ${(seconds / 3600).toFixed(1)} h left`;
}

const quoted = text => `'${text.replaceAll("'", "'\\''")}'`;
// The command that repeats a job's request.
// `asked` is what this page sent for the job, if it did: the negative prompt, and the number of pictures.
export function curl(job, server, model, asked, keyed) {
  const video = job.object === "video", notes = [], fields = [["prompt", job.prompt]];
  const negative = job.negative_prompt ?? asked?.negative;
  const pictures = asked?.pictures ?? model.pictures[0] ?? 0;
  if (negative) fields.push(["negative_prompt", negative]);
  fields.push(["size", job.size]);
  if (video) fields.push(["num_frames", job.num_frames], ["fps", job.fps]);
  if (job.steps != null) fields.push(["num_inference_steps", job.steps / job.n]);
  fields.push(["seed", job.seed]);
  if (job.n > 1) fields.push(["n", job.n]);
  if (!video) fields.push(["response_format", "url"]);
  if (negative === undefined) notes.push("# Add the negative prompt and the guidance of the request, if it had them.");
  if (pictures) notes.push("# The job has an input picture: name its file after the @.");
  else if (!asked && model.pictures.at(-1) > 0)
    notes.push("# If the job has an input picture, send a form with it instead (-F).");
  const route = video ? "videos" : pictures ? "images/edits" : "images/generations";
  const lines = [`curl -sS ${quoted(`${server}/v1/${route}`)}`];
  if (keyed) lines.push('-H "Authorization: Bearer $HALOVAE_API_KEY"');
  if (pictures) {
    for (const [name, value] of fields) lines.push(`--form-string ${quoted(`${name}=${value}`)}`);
    for (let index = 1; index <= pictures; index++)
      lines.push(`-F '${video ? "input_reference" : "image"}=@picture${pictures > 1 ? index : ""}.png'`);
  } else {
    const values = fields.map(([name, value]) => `"${name}": ${name === "seed" ? value : JSON.stringify(value)}`);
    lines.push("-H 'Content-Type: application/json'", `--data-raw ${quoted(`{${values.join(", ")}}`)}`);
  }
  return [...notes, lines.join(" \\\n  ")].join("\n");
}

// The grid of a job's decode as a drawing: which rank holds which shard. Empty without a grid.
export function plan(job) {
  const [, batch = 1, rows, cols] = (/^(?:(\d+)x)?(\d+)x(\d+)/.exec(job.decode?.plan) ?? []).map(text => text && +text);
  if (!rows) return [];
  const draw = (tag, attributes, text = "") => {
    const node = document.createElementNS("http://www.w3.org/2000/svg", tag);
    for (const [name, value] of Object.entries(attributes)) node.setAttribute(name, value);
    node.textContent = text;
    return node;
  };
  const [across, down] = job.size.split("x").map(Number), ratio = Math.min(3, Math.max(1 / 3, across / down));
  const width = Math.max(ratio < 1 ? 120 * ratio : 150, 26 * cols, 22 * rows * ratio), height = width / ratio;
  const side = Math.ceil(Math.sqrt(batch)), [cell, line] = [width / cols, height / rows], nodes = [], words = [];
  for (let group = 0; group < batch; group++) {
    const left = group % side * (width + 12) + 1, top = Math.floor(group / side) * (height + 12) + 1;
    for (let row = 0; row < rows; row++) {
      const ranks = Array.from({ length: cols }, (_, col) => (group * rows + row) * cols + col);
      for (const [col, rank] of ranks.entries()) {
        const [x, y] = [left + col * cell, top + row * line];
        nodes.push(draw("rect", { x, y, width: cell, height: line }), draw("text",
          { x: x + cell / 2, y: y + line / 2, "font-size": Math.min(18, cell / 2, line / 1.5) }, rank));
      }
      const where = batch > 1 ? `group ${group + 1} of results, row ${row + 1}` : `row ${row + 1}`;
      words.push(`${where}: rank${cols > 1 ? "s" : ""} ${ranks.join(", ")}`);
    }
  }
  const whole = [side * (width + 12) - 10, Math.ceil(batch / side) * (height + 12) - 10].map(Math.round);
  const picture = draw("svg", { viewBox: `0 0 ${whole.join(" ")}`, width: whole[0], height: whole[1], role: "img",
    "aria-label": `Plan ${job.decode.plan}. ${words.join("; ")}.` });
  picture.append(...nodes);
  const figure = el("figure"), groups = batch > 1 ? `, ${batch} groups of results` : "";
  figure.append(picture, el("figcaption", `The ranks' shards of the decode${groups}`));
  return [figure];
}

// What was made, and what its decode took.
export function facts(job) {
  const d = job.decode, frames = `${job.num_frames} frame${job.num_frames > 1 ? "s" : ""}`;
  const found = [[job.status === "completed" ? "Made" : "Asked", `${job.size}, ${frames}, seed ${job.seed}`]];
  for (const [name, asked] of Object.entries(job.adjusted)) found.push(["Rounded", `${name} from ${asked}`]);
  if (d) {
    if (job.inference_time_s != null) found.push(["Whole job", `${job.inference_time_s} s`]);
    found.push(["Plan", `${d.plan}: ${d.why}`]);
    const together = d.batch > 1 ? ` for ${d.batch} together` : "";
    found.push(["Decode", `${d.seconds} s${together}, ${d.peak_allocated_mb} MiB of maps per device`]);
  }
  if (d?.one_device) {
    const { seconds, peak_allocated_mb } = d.one_device, here = d.predicted?.seconds;
    const ratio = here > 0 ? `, ${(seconds / here).toFixed(2)} times this plan's` : "";
    found.push(["One device", `predicted ${seconds} s${ratio}, and ${peak_allocated_mb} MiB`]);
  }
  if (d?.fell_back) found.push(["Note", d.fell_back]);
  const list = el("dl");
  list.append(...found.flatMap(([name, value]) => [el("dt", name), el("dd", value)]));
  return list;
}
