/** Goal: killed at any moment, or with a disk that fails at any moment, lematt leaves nothing that the next run does not put right. */

import { pairs, sweep } from "./faults.ts";
import { missing, pointsOf, SITUATIONS, subjectIn, traced } from "./faults-strace.ts";

const ignore = missing !== undefined;
if (ignore) console.warn(`faults-process.test.ts: nothing is killed or failed, for strace says: ${missing}`);

/** A full disk, a broken one, one that this user may not change, and one that nobody may. */
const ERRORS = ["ENOSPC", "EIO", "EACCES", "EROFS"];

for (const situation of SITUATIONS) {
  Deno.test({
    name: `lematt can be killed at any change that it makes to a file (${situation})`,
    ignore,
    async fn() {
      await sweep(`SIGKILL, ${situation}`, await pointsOf(situation), 2, async (point) => {
        await using subject = await subjectIn(situation);
        const { befell } = await traced(subject, point, "signal=SIGKILL");
        await subject.afterFault();
        await subject.recover();
        return befell;
      });
    },
  });

  Deno.test({
    name: `any change that lematt makes to a file can fail (${situation})`,
    ignore,
    async fn() {
      const points = pairs(ERRORS, await pointsOf(situation));
      await sweep(`a failing disk, ${situation}`, points, 2, async ([error, point]) => {
        await using subject = await subjectIn(situation);
        const ran = await traced(subject, point, `error=${error}`);
        await subject.afterFault(ran);
        await subject.recover();
        return ran.befell;
      });
    },
  });
}
